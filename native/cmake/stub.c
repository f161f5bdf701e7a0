/* llama-cpp-python asks for a library named llama. This one holds nothing but the need for the real one: a symbol
 * looked up in it is found there. */
extern int sfi_stub;
int sfi_stub = 0;
