// The threads of libsfi, see team.cpp.
#pragma once

#include <cstdint>

// How often a thread looks whether it may go on before it sleeps. sfi_local/binding/library.py has the measurements.
enum { TEAM_SPIN_COUNT = 3000 };

// Of a parallel region that does not say how many; in backend.cpp.
int32_t team_default_threads();
