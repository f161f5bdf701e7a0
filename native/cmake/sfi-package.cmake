# What is installed: lib/ with the libraries, include/ with the headers a C embedder needs. In the Python package they lie
# in sfi_local/, with a stub, the cffi extension, _build_info.py and the catalogue of models.

# ---- the stub llama-cpp-python looks for -------------------------------------------------------------------------

set(SFI_STUB "")
if (SFI_PYTHON AND NOT WIN32)
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
set(SFI_HEADERS "${CMAKE_CURRENT_SOURCE_DIR}/include/sfi.h" "${CMAKE_CURRENT_SOURCE_DIR}/include/sfi-research.h")

# ---- install -------------------------------------------------------------------------------------------------------

set(SFI_PREFIX "")
if (SFI_PYTHON)
    include(sfi-python)
    set(SFI_PREFIX "sfi_local/")
endif()
install(TARGETS ${SFI_LIBRARIES} ${SFI_STUB}
    LIBRARY DESTINATION ${SFI_PREFIX}lib
    RUNTIME DESTINATION ${SFI_PREFIX}lib
    ARCHIVE DESTINATION ${SFI_PREFIX}lib EXCLUDE_FROM_ALL)
install(FILES ${SFI_HEADERS} "${SFI_GENERATED}/sfi-source-id.h" DESTINATION ${SFI_PREFIX}include)
install(DIRECTORY "${SFI_TREE}/include/" "${SFI_TREE}/ggml/include/" DESTINATION ${SFI_PREFIX}include FILES_MATCHING PATTERN "*.h")
install(FILES "${SFI_TREE}/LICENSE" DESTINATION ${SFI_PREFIX}lib RENAME LICENSE-llama.cpp)
