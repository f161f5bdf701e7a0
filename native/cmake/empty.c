/* A library of nothing: see sfi-variants.cmake. */
typedef int sfi_nothing;
