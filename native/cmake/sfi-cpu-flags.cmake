# SFI_CPU_FLAGS: the CPU features, as /proc/cpuinfo names them, that a build for this machine cannot run without.
# Python compares them before it loads the libraries: a sentence instead of an illegal instruction.

set(SFI_CPU_FLAGS "")
if (SFI_PORTABLE OR MSVC OR NOT CMAKE_SYSTEM_NAME STREQUAL "Linux" OR NOT TARGET ggml-cpu)
    return()
endif()

get_target_property(options ggml-cpu COMPILE_OPTIONS)
list(FILTER options INCLUDE REGEX "^-m")
execute_process(
    COMMAND ${CMAKE_C_COMPILER} ${options} -dM -E -x c /dev/null
    OUTPUT_VARIABLE macros RESULT_VARIABLE failed)
if (failed)
    message(WARNING "The compiler does not list its macros: the build will not know which CPU it needs.")
    return()
endif()
if (NOT CMAKE_CROSSCOMPILING AND EXISTS /proc/cpuinfo)
    file(STRINGS /proc/cpuinfo host REGEX "^(flags|Features)[ \t]*:" LIMIT_COUNT 1)
endif()

# macro of the compiler / name in /proc/cpuinfo
set(known
    SSE3/pni SSSE3/ssse3 SSE4_1/sse4_1 SSE4_2/sse4_2 POPCNT/popcnt LZCNT/abm MOVBE/movbe AVX/avx AVX2/avx2 FMA/fma
    F16C/f16c BMI/bmi1 BMI2/bmi2 ADX/adx GFNI/gfni VAES/vaes VPCLMULQDQ/vpclmulqdq AVXVNNI/avx_vnni SHA/sha_ni
    AVX512F/avx512f AVX512CD/avx512cd AVX512BW/avx512bw AVX512DQ/avx512dq AVX512VL/avx512vl AVX512IFMA/avx512ifma
    AVX512VBMI/avx512vbmi AVX512VBMI2/avx512_vbmi2 AVX512VNNI/avx512_vnni AVX512BITALG/avx512_bitalg
    AVX512VPOPCNTDQ/avx512_vpopcntdq AVX512BF16/avx512_bf16 AVX512FP16/avx512_fp16
    AMX_TILE/amx_tile AMX_INT8/amx_int8 AMX_BF16/amx_bf16
    ARM_FEATURE_DOTPROD/asimddp ARM_FEATURE_FP16_VECTOR_ARITHMETIC/asimdhp ARM_FEATURE_MATMUL_INT8/i8mm
    ARM_FEATURE_BF16/bf16 ARM_FEATURE_SVE/sve ARM_FEATURE_SVE2/sve2 ARM_FEATURE_SME/sme ARM_FEATURE_ATOMICS/atomics)
foreach (pair IN LISTS known)
    string(REGEX MATCH "^(.+)/(.+)$" _ "${pair}")
    set(flag "${CMAKE_MATCH_2}")
    if (macros MATCHES "#define __${CMAKE_MATCH_1}(__)? " AND (NOT host OR "${host} " MATCHES "[ \t]${flag} "))
        list(APPEND SFI_CPU_FLAGS ${flag})
    endif()
endforeach()
message(STATUS "This build needs a CPU with: ${SFI_CPU_FLAGS}")
