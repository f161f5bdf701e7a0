# The CPU variants of a portable build. Upstream has one for every step of the architecture, and builds all: some are for CPUs that
# do not exist, some for few old ones that the next smaller one serves, and a compiler that does not know one feature (GCC 12 and
# sme) ends the build after most of its work. Here are those that are worth 1.5 MB each, as far as the compiler can make them.

include(CheckCSourceCompiles)

set(SFI_USUAL_VARIANTS
    x64              # x86-64 of any age
    sse42            # before AVX2: up to 2013, small Atoms later
    haswell          # AVX2: from 2013 on, AMD from Zen on
    alderlake        # AVX2 with VNNI: Intel's desktops from 2021 on
    skylakex         # AVX-512
    cascadelake      # with VNNI: most servers
    zen4             # with bfloat16: AMD from 2022 on
    sapphirerapids   # with AMX: Intel's servers from 2023 on
    armv8.0_1        # any arm64: Raspberry Pi 3 and 4, Jetson Nano
    armv8.2_2        # dot products and 16-bit floats: Raspberry Pi 5, RK3588, Jetson Orin, Graviton 2
    armv8.6_1        # SVE and i8mm: Graviton 3
    armv8.6_2        # SVE2: Graviton 4, Grace, the Cortex-A7xx of boards from 2024 on
    armv9.2_2)       # SME

# Whether a CPU target of upstream is built; a variant that is not is left out.
function(sfi_take_variant target result)
    set(${result} ON PARENT_SCOPE)
    if (NOT SFI_PORTABLE)
        return()
    endif()
    if (SFI_VARIANTS)
        set(wanted ${SFI_VARIANTS})
    elseif (CMAKE_SYSTEM_PROCESSOR MATCHES "^(x86_64|AMD64|aarch64|arm64)$" AND NOT APPLE AND NOT ANDROID)
        set(wanted ${SFI_USUAL_VARIANTS})
    else()
        set(wanted all)
    endif()
    string(REGEX REPLACE "^ggml-cpu-" "" name "${target}")
    sfi_compiler_can(${target} can)
    if (NOT can)
        get_target_property(options ${target} COMPILE_OPTIONS)
        list(FILTER options INCLUDE REGEX "^-m")
        message(STATUS "${target} is left out: ${CMAKE_C_COMPILER_ID} ${CMAKE_C_COMPILER_VERSION} does not know ${options}")
    elseif (wanted STREQUAL "all" OR name IN_LIST wanted)
        return()
    endif()
    sfi_drop_variant(${target})
    set(${result} OFF PARENT_SCOPE)
endfunction()

# Does the compiler know the instruction sets that a target asks for?
function(sfi_compiler_can target result)
    get_target_property(options ${target} COMPILE_OPTIONS)
    list(FILTER options INCLUDE REGEX "^-m")
    string(REPLACE ";" " " CMAKE_REQUIRED_FLAGS "${options}")
    string(MAKE_C_IDENTIFIER "SFI_COMPILER_CAN${CMAKE_REQUIRED_FLAGS}" variable)
    set(CMAKE_REQUIRED_QUIET ON)
    check_c_source_compiles("int main(void) { return 0; }" ${variable})
    set(${result} "${${variable}}" PARENT_SCOPE)
endfunction()

# ggml depends on the target, and CMake takes no dependency back, so the target stays as an empty library that lies where nobody
# looks for backends.
function(sfi_drop_variant target)
    set_target_properties(${target} PROPERTIES
        SOURCES                  "${CMAKE_CURRENT_FUNCTION_LIST_DIR}/empty.c"
        COMPILE_OPTIONS          ""
        LINK_LIBRARIES           ""
        LIBRARY_OUTPUT_DIRECTORY "${CMAKE_BINARY_DIR}/left-out")
endfunction()
