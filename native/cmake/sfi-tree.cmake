# SFI_TREE: the llama.cpp sources to build.

set(SFI_PATCHSET "${SFI_ROOT}/patches/patchset.py")

if (SFI_LLAMA_TREE)
    set(SFI_TREE "${SFI_LLAMA_TREE}")
else()
    set(SFI_TREE "${CMAKE_BINARY_DIR}/llama.cpp")
    # does nothing while pin and series are the same; touches only the files whose content changed
    execute_process(COMMAND "${Python_EXECUTABLE}" "${SFI_PATCHSET}" apply "${SFI_TREE}" RESULT_VARIABLE failed)
    if (failed)
        message(FATAL_ERROR "There is no patched llama.cpp to build; the line above says why.")
    endif()
    file(GLOB SFI_SERIES CONFIGURE_DEPENDS "${SFI_ROOT}/patches/*.patch" "${SFI_ROOT}/patches/series" "${SFI_ROOT}/patches/upstream")
    set_property(DIRECTORY APPEND PROPERTY CMAKE_CONFIGURE_DEPENDS ${SFI_SERIES})
endif()

if (NOT EXISTS "${SFI_TREE}/ggml/CMakeLists.txt")
    message(FATAL_ERROR "${SFI_TREE} is not a llama.cpp source tree.")
endif()
