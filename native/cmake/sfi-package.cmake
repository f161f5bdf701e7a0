# What the Python package holds: lib/ with the libraries and a stub, include/ with the headers a C embedder needs,
# the cffi extension, _build_info.py and the catalogue of models.

# ---- the stub llama-cpp-python looks for -------------------------------------------------------------------------

set(SFI_STUB "")
if (NOT WIN32)
    set(SFI_STUB sfi-stub)
    add_library(sfi-stub SHARED cmake/stub.c)
    target_link_libraries(sfi-stub PRIVATE llama)
    target_link_options(sfi-stub PRIVATE ${SFI_RPATH_FIRST} "$<$<NOT:$<PLATFORM_ID:Darwin>>:LINKER:--no-as-needed>")
    set_target_properties(sfi-stub PROPERTIES
        OUTPUT_NAME              llama
        NO_SONAME                ON   # nobody else's "libllama.so" shall be satisfied by this one
        BUILD_WITH_INSTALL_RPATH ON
        INSTALL_RPATH            "${SFI_ORIGIN}"
        LIBRARY_OUTPUT_DIRECTORY "${CMAKE_BINARY_DIR}/bin")
endif()

# ---- the source id -------------------------------------------------------------------------------------------------

add_custom_target(sfi-source-id
    COMMAND "${Python_EXECUTABLE}" "${SFI_PATCHSET}" source-id --header "${SFI_GENERATED}/sfi-source-id.h"
    BYPRODUCTS "${SFI_GENERATED}/sfi-source-id.h"
    COMMENT "" VERBATIM)
add_dependencies(llama sfi-source-id)

# ---- the cffi extension --------------------------------------------------------------------------------------------

set(ffi "${CMAKE_CURRENT_SOURCE_DIR}/ffi/build_ffi.py")
set(SFI_HEADERS "${CMAKE_CURRENT_SOURCE_DIR}/include/sfi.h" "${CMAKE_CURRENT_SOURCE_DIR}/include/sfi-research.h")
add_custom_command(
    OUTPUT  "${SFI_GENERATED}/_sfi.c"
    COMMAND "${Python_EXECUTABLE}" "${ffi}" ${SFI_HEADERS} "${SFI_GENERATED}/_sfi.c"
    DEPENDS "${ffi}" ${SFI_HEADERS}
    COMMENT "Generating _sfi.c from the headers" VERBATIM)

Python_add_library(sfi-ffi MODULE "${SFI_GENERATED}/_sfi.c")
target_link_libraries(sfi-ffi PRIVATE llama)
target_link_options(sfi-ffi PRIVATE ${SFI_RPATH_FIRST})
if (SFI_FFI_SUFFIX STREQUAL ".abi3")
    target_compile_definitions(sfi-ffi PRIVATE Py_LIMITED_API=0x030A0000)
endif()
if (WIN32)
    set(extension ".pyd")
    set(suffix "")
    if (NOT SFI_FFI_SUFFIX STREQUAL ".abi3")
        set(suffix "${SFI_FFI_SUFFIX}")
    endif()
else()
    set(extension ".so")
    set(suffix "${SFI_FFI_SUFFIX}")
endif()
set_target_properties(sfi-ffi PROPERTIES
    PREFIX                   ""
    OUTPUT_NAME              "_sfi"
    SUFFIX                   "${suffix}${extension}"
    BUILD_WITH_INSTALL_RPATH ON
    INSTALL_RPATH            "${SFI_ORIGIN}/lib"
    LIBRARY_OUTPUT_DIRECTORY "${CMAKE_BINARY_DIR}/package")

# ---- _build_info.py ------------------------------------------------------------------------------------------------

include(sfi-cpu-flags)
string(REPLACE ";" " " SFI_CPU_FLAGS_WORDS "${SFI_CPU_FLAGS}")
add_custom_target(sfi-build-info ALL
    COMMAND "${Python_EXECUTABLE}" "${CMAKE_CURRENT_SOURCE_DIR}/cmake/build_info.py"
        "${CMAKE_BINARY_DIR}/package/_build_info.py"
        "build_type=$<CONFIG>"
        "portable=$<BOOL:${SFI_PORTABLE}>"
        "cpu_flags=${SFI_CPU_FLAGS_WORDS}"
        "compiler=${CMAKE_CXX_COMPILER_ID} ${CMAKE_CXX_COMPILER_VERSION}"
    BYPRODUCTS "${CMAKE_BINARY_DIR}/package/_build_info.py"
    COMMENT "" VERBATIM)

# ---- install -------------------------------------------------------------------------------------------------------

install(TARGETS ${SFI_LIBRARIES} ${SFI_STUB}
    LIBRARY DESTINATION sfi_local/lib
    RUNTIME DESTINATION sfi_local/lib
    ARCHIVE DESTINATION sfi_local/lib EXCLUDE_FROM_ALL)
install(TARGETS sfi-ffi LIBRARY DESTINATION sfi_local RUNTIME DESTINATION sfi_local)
install(FILES "${CMAKE_BINARY_DIR}/package/_build_info.py" DESTINATION sfi_local)
install(DIRECTORY "${SFI_ROOT}/models/" DESTINATION sfi_local/models FILES_MATCHING PATTERN "*.json")
install(FILES ${SFI_HEADERS} "${SFI_GENERATED}/sfi-source-id.h" DESTINATION sfi_local/include)
install(DIRECTORY "${SFI_TREE}/include/" "${SFI_TREE}/ggml/include/" DESTINATION sfi_local/include FILES_MATCHING PATTERN "*.h")
install(FILES "${SFI_TREE}/LICENSE" DESTINATION sfi_local/lib RENAME LICENSE-llama.cpp)
