# Programs for development and CI: upstream's op tests (with our cases, from the patches) and the C example.

find_package(Threads REQUIRED)

set(SFI_PROGRAMS "")
add_executable(test-backend-ops "${SFI_TREE}/tests/test-backend-ops.cpp")
target_include_directories(test-backend-ops PRIVATE "${CMAKE_CURRENT_SOURCE_DIR}/tests")
target_link_libraries(test-backend-ops PRIVATE ggml ggml-base Threads::Threads)
if (UNIX)
    target_compile_options(test-backend-ops PRIVATE -O1) # what is tested lies in the libraries, and these are many lines
endif()
list(APPEND SFI_PROGRAMS test-backend-ops)

file(GLOB examples CONFIGURE_DEPENDS "${CMAKE_CURRENT_SOURCE_DIR}/examples/*.c")
foreach (source IN LISTS examples)
    get_filename_component(name "${source}" NAME_WE)
    add_executable(sfi-example-${name} "${source}")
    target_link_libraries(sfi-example-${name} PRIVATE llama)
    list(APPEND SFI_PROGRAMS sfi-example-${name})
endforeach()

file(GLOB unit_tests CONFIGURE_DEPENDS "${CMAKE_CURRENT_SOURCE_DIR}/tests/*.cpp")
foreach (source IN LISTS unit_tests)
    get_filename_component(name "${source}" NAME_WE)
    add_executable(sfi-${name} "${source}")
    target_include_directories(sfi-${name} PRIVATE "${CMAKE_CURRENT_SOURCE_DIR}" "${CMAKE_CURRENT_SOURCE_DIR}/api")
    target_link_libraries(sfi-${name} PRIVATE llama)
    list(APPEND SFI_PROGRAMS sfi-${name})
endforeach()

foreach (program IN LISTS SFI_PROGRAMS)
    set_target_properties(${program} PROPERTIES
        CXX_STANDARD 17
        BUILD_WITH_INSTALL_RPATH ON
        INSTALL_RPATH "${SFI_ORIGIN}"
        RUNTIME_OUTPUT_DIRECTORY "${CMAKE_BINARY_DIR}/bin")
endforeach()

# The GPUs' kernels on the CPU: backends that test-backend-ops loads.
if (UNIX)
    set(shim "${CMAKE_CURRENT_SOURCE_DIR}/tests/gpu-shim")
    sfi_write_metal_text("${SFI_GENERATED}")
    set(cuda_sources "")
    set(metal_sources ${SFI_METAL_SOURCES})
    foreach (gpu cuda metal)
        set(target sfi-${gpu}-shim)
        add_library(${target} MODULE "${shim}/${gpu}-shim.cpp" "${shim}/gpu-shim.cpp" "${shim}/shim-backend.cpp" ${${gpu}_sources})
        target_include_directories(${target} PRIVATE "${shim}" "${CMAKE_CURRENT_SOURCE_DIR}/ggml" "${CMAKE_CURRENT_SOURCE_DIR}/ggml/${gpu}"
            "${SFI_TREE}/ggml/src" "${SFI_TREE}/ggml/src/ggml-metal" "${SFI_GENERATED}")
        target_compile_definitions(${target} PRIVATE SFI_GPU_SHIM GGML_BACKEND_DL GGML_BACKEND_BUILD GGML_BACKEND_SHARED)
        target_compile_options(${target} PRIVATE -O2 -Wall -Wextra -Wno-unknown-pragmas -Wno-unused-function)
        target_link_libraries(${target} PRIVATE ggml-base)
        set_target_properties(${target} PROPERTIES
            CXX_STANDARD 17
            PREFIX "lib"
            BUILD_WITH_INSTALL_RPATH ON
            INSTALL_RPATH "${SFI_ORIGIN}"
            LIBRARY_OUTPUT_DIRECTORY "${CMAKE_BINARY_DIR}/bin")
    endforeach()
    # Metal compiles with fast math, and positions that a kernel does not need are parameters all the same
    set_source_files_properties("${shim}/metal-shim.cpp" PROPERTIES
        COMPILE_OPTIONS "-ffast-math;-Wno-attributes;-Wno-unused-parameter"
        OBJECT_DEPENDS "${SFI_GENERATED}/sfi-kernels.metal")
endif()

# What benchmarks/trace_steps.py has the CUDA driver load. CUPTI is a part of the toolkit that may not be there.
if (TARGET ggml-cuda)
    find_package(CUDAToolkit QUIET)
    if (TARGET CUDA::cupti)
        add_library(sfi-trace-cuda MODULE "${CMAKE_CURRENT_SOURCE_DIR}/tests/gpu-trace/trace-cuda.cpp")
        target_link_libraries(sfi-trace-cuda PRIVATE CUDA::cupti)
        set_target_properties(sfi-trace-cuda PROPERTIES CXX_STANDARD 17 PREFIX "lib" LIBRARY_OUTPUT_DIRECTORY "${CMAKE_BINARY_DIR}/bin")
    endif()
endif()
