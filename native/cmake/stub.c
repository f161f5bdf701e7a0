/* llama-cpp-python asks for libraries named llama and ggml. This file, compiled twice under those names, holds nothing
 * but the need for the real ones: a symbol looked up in it is found in them. */
extern int sfi_stub;
int sfi_stub = 0;
