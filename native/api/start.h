// What sfi_init() was asked for, and whether this CPU can run this build.
#pragma once

#include <cstdint>
#include <string>

// Threads of a context whose parameters do not say how many.
int32_t start_threads();

// How often a thread of libsfi looks for work before it sleeps; 0: as it likes.
int32_t start_spin();

// The features that this build needs and this CPU lacks, as /proc/cpuinfo names them: "avx512f, amx_int8"; "" if it has all.
std::string missing_cpu_features();

// Keeps the sentence for sfi_last_error(); 0 or SFI_ERR_CPU
int check_cpu();
