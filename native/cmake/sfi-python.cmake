# What the Python package holds beside the libraries.

# ---- the cffi extension --------------------------------------------------------------------------------------------

set(ffi "${CMAKE_CURRENT_SOURCE_DIR}/ffi/build_ffi.py")
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

install(TARGETS sfi-ffi LIBRARY DESTINATION sfi_local RUNTIME DESTINATION sfi_local)
install(FILES "${CMAKE_BINARY_DIR}/package/_build_info.py" DESTINATION sfi_local)
install(DIRECTORY "${SFI_ROOT}/models/" DESTINATION sfi_local/models FILES_MATCHING PATTERN "*.json")
