# What is installed: for C programs libsfi and all that goes with it (sfi-embed.cmake); in the Python package also the libraries that
# Python uses, in sfi_local/lib, with a stub, the cffi extension, _build_info.py and the catalogue of models.

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

# ---- the CPU that the build is for -----------------------------------------------------------------------------------

include(sfi-cpu-flags)
string(REPLACE ";" " " SFI_CPU_FLAGS_WORDS "${SFI_CPU_FLAGS}")
set_source_files_properties("${CMAKE_CURRENT_SOURCE_DIR}/api/cpu-features.cpp" TARGET_DIRECTORY llama PROPERTIES
    COMPILE_DEFINITIONS "SFI_CPU_FLAGS=\"${SFI_CPU_FLAGS_WORDS}\"")

# ---- install -------------------------------------------------------------------------------------------------------

include(sfi-embed) # libsfi, the one library that a C program links, with its headers
if (SFI_PYTHON)
    include(sfi-python)
    set(SFI_PREFIX "sfi_local/")
endif()
if (SFI_PYTHON OR NOT SFI_EMBED)
    install(TARGETS ${SFI_LIBRARIES} ${SFI_STUB}
        LIBRARY DESTINATION ${SFI_PREFIX}lib
        RUNTIME DESTINATION ${SFI_PREFIX}lib
        ARCHIVE DESTINATION ${SFI_PREFIX}lib EXCLUDE_FROM_ALL)
    install(FILES "${SFI_TREE}/LICENSE" DESTINATION ${SFI_PREFIX}lib RENAME LICENSE-llama.cpp)
endif()
if (NOT SFI_EMBED)
    install(FILES ${SFI_HEADERS} "${SFI_GENERATED}/sfi-source-id.h" DESTINATION ${SFI_PREFIX}include)
    install(DIRECTORY "${SFI_TREE}/include/" "${SFI_TREE}/ggml/include/" DESTINATION ${SFI_PREFIX}include FILES_MATCHING PATTERN "*.h")
endif()
