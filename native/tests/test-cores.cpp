// How many threads C programs get: sfi-test-cores ROOT CPU... prints the number. tests/test_cpus.py compares it with Python's.

#include "cores.h"
#include "sfi.h"

#include <cstdio>
#include <cstdlib>

int main(int argc, char ** argv) {
    std::set<int> cpus;
    for (int i = 2; i < argc; ++i) {
        cpus.insert(atoi(argv[i]));
    }
    printf("%d\n", argc > 1 ? choose_threads(argv[1], cpus) : sfi_threads());
    return 0;
}
