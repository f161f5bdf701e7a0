# Programs for development and CI: upstream's op tests (with our cases, from the patches) and the C example.

find_package(Threads REQUIRED)

set(SFI_PROGRAMS "")
add_executable(test-backend-ops "${SFI_TREE}/tests/test-backend-ops.cpp")
target_include_directories(test-backend-ops PRIVATE "${CMAKE_CURRENT_SOURCE_DIR}/tests")
target_link_libraries(test-backend-ops PRIVATE ggml ggml-base Threads::Threads)
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
    target_include_directories(sfi-${name} PRIVATE "${CMAKE_CURRENT_SOURCE_DIR}")
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
