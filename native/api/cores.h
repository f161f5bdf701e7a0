// How many threads to compute with.
#pragma once

#include <cstdint>
#include <set>
#include <string>

// One per core that is as fast as the fastest, within what this process may use: sfi_local/cpus.py says why. root: where /sys and /proc
// are looked for.
int32_t choose_threads(const std::string & root, const std::set<int> & cpus);

std::set<int> usable_cpus();
