/* Read by the compiler before ggml-cpu/amx/mmq.cpp alone, see sfi-upstream.cmake.
 *
 * GCC's _tile_loadconfig() says that it reads 8 bytes of the configuration, so an optimised build leaves out the stores to the
 * other 56, and the CPU refuses what is left: on a machine with AMX the first matrix product ended in a segmentation fault.
 * This one says that it reads all 64. patches/upstream-amx-tile-config.md is the text for llama.cpp. */
#if defined(__GNUC__) && !defined(__clang__) && defined(__AMX_TILE__)
#include <immintrin.h>
#undef  _tile_loadconfig
#define _tile_loadconfig(config) __asm__ volatile("ldtilecfg\t%X0" : : "m"(*(const char (*)[64])(config)))
#endif
