// Parameters: defaults, ranges, and what they mean for a support.

#pragma once

#include "sfi-research.h"

#include "llama-support.h"

#include <array>

struct sfi_settings {
    sfi_params   params;
    sfi_research research;
};

// Do slow steps choose what fast steps attend to? Else each fast step does: few cells are enough then, and a slow step renews
// nothing.
bool refreshes(sfi_policy policy);

sfi_settings default_settings(sfi_policy policy);

// Those of the caller, checked; null: the defaults. `params.research` of the result is null.
int read_settings(const sfi_params * theirs, sfi_settings & out);

llama_support_params support_params(const sfi_settings & s);

// auto_depth, by rule where it is -1.
int32_t auto_depth(const sfi_params & p);
