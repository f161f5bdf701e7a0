# Upstream's targets with our sources added to them.

# plain variables: upstream's option() respects them, and they are gone when a build directory is configured anew
set(BUILD_SHARED_LIBS      ON)
set(LLAMA_BUILD_COMMON     OFF)
set(LLAMA_BUILD_TESTS      OFF)
set(LLAMA_BUILD_TOOLS      OFF)
set(LLAMA_BUILD_EXAMPLES   OFF)
set(LLAMA_BUILD_SERVER     OFF)
set(LLAMA_BUILD_APP        OFF)
set(LLAMA_OPENSSL          OFF)
set(GGML_CCACHE            OFF)  # the launcher is set already
set(GGML_RPC    ${SFI_PYTHON})    # `sfi-local serve --rpc`
set(GGML_RPC_RDMA          OFF)  # a library that happens to be on the machine of the build would be needed on all

# The names of source files, which assertions print, are those of the source tree: what is given away says nothing of where it was
# built. (Builds for development share the objects that they had.)
if ((SKBUILD OR NOT SFI_PYTHON) AND CMAKE_C_COMPILER_ID MATCHES "GNU|Clang" AND NOT MSVC)
    foreach (folder "${SFI_ROOT}" "${CMAKE_BINARY_DIR}" "${SFI_TREE}") # of those that fit the last counts
        add_compile_options("$<$<COMPILE_LANGUAGE:C,CXX>:-fmacro-prefix-map=${folder}/=>")
    endforeach()
endif()

if (SFI_SANITIZE)
    add_link_options(-fsanitize=${SFI_SANITIZE})
endif()

# A portable build carries one CPU library per feature set and picks one when it starts.
if (SFI_PORTABLE)
    set(GGML_NATIVE           OFF)
    set(GGML_BACKEND_DL       ON)
    set(GGML_CPU_ALL_VARIANTS ON)
endif()

# Upstream asks git for its commit and would find ours, or that of the repository it happens to lie in.
file(STRINGS "${SFI_ROOT}/patches/upstream" SFI_PIN REGEX "^[a-z_]+=")
foreach (line IN LISTS SFI_PIN)
    if (line MATCHES "^([a-z_]+)=(.*)$")
        set(SFI_PIN_${CMAKE_MATCH_1} "${CMAKE_MATCH_2}")
    endif()
endforeach()
set(LLAMA_BUILD_COMMIT "${SFI_PIN_llama_commit}")
set(LLAMA_BUILD_NUMBER 0)

set(SFI_SAVED_GIT_DIR "$ENV{GIT_DIR}")
set(ENV{GIT_DIR} "${CMAKE_BINARY_DIR}/no-git-here")
add_subdirectory("${SFI_TREE}" "${CMAKE_BINARY_DIR}/llama" EXCLUDE_FROM_ALL)
if (SFI_SAVED_GIT_DIR STREQUAL "")
    unset(ENV{GIT_DIR})
else()
    set(ENV{GIT_DIR} "${SFI_SAVED_GIT_DIR}")
endif()

# ---- the targets ----------------------------------------------------------------------------------------------

include(sfi-variants)
get_property(targets DIRECTORY "${SFI_TREE}/ggml/src" PROPERTY BUILDSYSTEM_TARGETS)
set(SFI_CPU_TARGETS "")
set(SFI_BACKEND_TARGETS "")
foreach (target IN LISTS targets)
    get_target_property(type ${target} TYPE)
    if (type STREQUAL "SHARED_LIBRARY" OR type STREQUAL "MODULE_LIBRARY")
        if (target MATCHES "^ggml-cpu(-|$)")
            sfi_take_variant(${target} taken)
            if (taken)
                list(APPEND SFI_CPU_TARGETS ${target})
            endif()
        elseif (NOT target MATCHES "^ggml(-base)?$")
            list(APPEND SFI_BACKEND_TARGETS ${target})
        endif()
    endif()
endforeach()
foreach (backend cuda metal vulkan blas hip musa sycl opencl rpc)  # backends live in directories of their own
    if (TARGET ggml-${backend})
        list(APPEND SFI_BACKEND_TARGETS ggml-${backend})
    endif()
endforeach()
list(REMOVE_DUPLICATES SFI_BACKEND_TARGETS)
set(SFI_LIBRARIES llama ggml ggml-base ${SFI_CPU_TARGETS} ${SFI_BACKEND_TARGETS})

# ---- our sources ----------------------------------------------------------------------------------------------

include(sfi-metal)
set(native "${CMAKE_CURRENT_SOURCE_DIR}")
set(SFI_GENERATED "${CMAKE_BINARY_DIR}/generated")
file(MAKE_DIRECTORY "${SFI_GENERATED}")
file(GLOB SFI_GGML_SOURCES  CONFIGURE_DEPENDS "${native}/ggml/*.c"       "${native}/ggml/*.cpp")
file(GLOB SFI_CPU_SOURCES   CONFIGURE_DEPENDS "${native}/ggml/cpu/*.c"   "${native}/ggml/cpu/*.cpp")
file(GLOB SFI_LLAMA_SOURCES CONFIGURE_DEPENDS "${native}/llama/*.cpp" "${native}/api/*.cpp")

if (SFI_GGML_SOURCES)
    target_sources(ggml-base PRIVATE ${SFI_GGML_SOURCES})
endif()
target_include_directories(ggml-base PUBLIC "$<BUILD_INTERFACE:${native}/ggml>")

# in upstream's CPU targets ours are compiled with the same instruction-set flags
foreach (target IN LISTS SFI_CPU_TARGETS)
    if (SFI_CPU_SOURCES)
        target_sources(${target} PRIVATE ${SFI_CPU_SOURCES})
    endif()
    target_include_directories(${target} PRIVATE "${native}/ggml" "${native}/ggml/cpu" "${SFI_TREE}/ggml/src" "${SFI_TREE}/ggml/src/ggml-cpu")
endforeach()

# where GCC drops a part of AMX's tile configuration; that header says why
if (CMAKE_CXX_COMPILER_ID STREQUAL "GNU" AND SFI_CPU_TARGETS)
    set_property(SOURCE "${SFI_TREE}/ggml/src/ggml-cpu/amx/mmq.cpp" TARGET_DIRECTORY ${SFI_CPU_TARGETS}
        APPEND PROPERTY COMPILE_OPTIONS "-include;${native}/cmake/sfi-amx-tile-config.h")
endif()

# likewise in the GPUs' targets
file(GLOB SFI_CUDA_SOURCES CONFIGURE_DEPENDS "${native}/ggml/cuda/*.cu")
foreach (target ggml-cuda ggml-hip ggml-musa)
    if (TARGET ${target})
        target_include_directories(${target} PRIVATE "${native}/ggml" "${native}/ggml/cuda" "${SFI_TREE}/ggml/src/ggml-cuda")
    endif()
endforeach()
if (TARGET ggml-cuda)
    target_sources(ggml-cuda PRIVATE ${SFI_CUDA_SOURCES})
endif()
file(GLOB SFI_METAL_SOURCES CONFIGURE_DEPENDS "${native}/ggml/metal/*.cpp")
if (TARGET ggml-metal)
    sfi_write_metal_text("${SFI_GENERATED}")
    target_sources(ggml-metal PRIVATE ${SFI_METAL_SOURCES})
    target_include_directories(ggml-metal PRIVATE "${native}/ggml" "${native}/ggml/metal" "${SFI_TREE}/ggml/src/ggml-metal" "${SFI_GENERATED}")
    target_compile_features(ggml-metal PRIVATE cxx_std_17)
endif()

# sfi-source-id.h is written there at build time, so that an edit recompiles the one file that includes it
if (SFI_LLAMA_SOURCES)
    target_sources(llama PRIVATE ${SFI_LLAMA_SOURCES})
    set_source_files_properties(${SFI_LLAMA_SOURCES} TARGET_DIRECTORY llama PROPERTIES SKIP_UNITY_BUILD_INCLUSION ON)
endif()
target_include_directories(llama
    PUBLIC  "$<BUILD_INTERFACE:${native}/include>"
    PRIVATE "${native}/api" "${native}/llama" "${native}/ggml" "${SFI_GENERATED}")
target_compile_definitions(llama PRIVATE SFI_BUILD)
target_compile_features(llama PRIVATE cxx_std_17)

# Each function by itself: inlined into one another, a kernel with its checks takes the compiler minutes.
if (SFI_SANITIZE)
    set_property(SOURCE ${SFI_GGML_SOURCES} ${SFI_CPU_SOURCES} ${SFI_LLAMA_SOURCES} TARGET_DIRECTORY ggml-base ${SFI_CPU_TARGETS} llama
        APPEND PROPERTY COMPILE_OPTIONS -fsanitize=${SFI_SANITIZE} -fno-sanitize-recover=undefined -fno-omit-frame-pointer -O1 -g1 -DSFI_INLINE=inline)
endif()

# ---- names: neither shadow another llama.cpp nor be shadowed by one -----------------------------------------------

# upstream finds the libraries of a portable build by their file names, and Windows its DLLs
set(SFI_RENAMED "")
if (NOT WIN32)
    set(SFI_RENAMED llama ggml ggml-base)
    if (NOT SFI_PORTABLE)
        list(APPEND SFI_RENAMED ${SFI_CPU_TARGETS} ${SFI_BACKEND_TARGETS})
    endif()
endif()
foreach (target IN LISTS SFI_RENAMED)
    set_target_properties(${target} PROPERTIES OUTPUT_NAME "sfi-${target}")
endforeach()

set(SFI_RPATH_FIRST "")
if (APPLE)
    set(SFI_ORIGIN "@loader_path")
else()
    set(SFI_ORIGIN "$ORIGIN")
    if (ANDROID)
        set(SFI_RPATH_FIRST "LINKER:--enable-new-dtags")   # its linker reads RUNPATH and no RPATH
    elseif (UNIX)
        set(SFI_RPATH_FIRST "LINKER:--disable-new-dtags")  # look beside the library before LD_LIBRARY_PATH
    endif()
endif()
foreach (target IN LISTS SFI_LIBRARIES)
    set_property(TARGET ${target} PROPERTY VERSION)    # wheels cannot carry the links that
    set_property(TARGET ${target} PROPERTY SOVERSION)  # versioned names need
    set_property(TARGET ${target} PROPERTY PUBLIC_HEADER)
    set_target_properties(${target} PROPERTIES
        EXCLUDE_FROM_ALL         OFF
        BUILD_WITH_INSTALL_RPATH ON
        INSTALL_RPATH            "${SFI_ORIGIN}"
        LIBRARY_OUTPUT_DIRECTORY "${CMAKE_BINARY_DIR}/bin"
        RUNTIME_OUTPUT_DIRECTORY "${CMAKE_BINARY_DIR}/bin")
    if (UNIX AND NOT APPLE)
        target_link_options(${target} PRIVATE "LINKER:-Bsymbolic" ${SFI_RPATH_FIRST})
    endif()
endforeach()
if (WIN32)
    set_target_properties(llama PROPERTIES WINDOWS_EXPORT_ALL_SYMBOLS ON)
endif()
