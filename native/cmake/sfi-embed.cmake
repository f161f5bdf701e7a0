# libsfi: the one library that a C program links. It is linked from the objects of the other libraries, with ggml and C++ hidden in it,
# llama.cpp's functions under names of our own (native/embed/headers.py says why), and threads of our own (native/embed/team.cpp).
#
#     cpu-VARIANT.o   the kernels for one kind of CPU. What they share in name with another kind, such as a template of the standard
#                     library that is compiled with AVX-512 here, is made local: it must not serve the others
#     llama.o         llama.cpp and sfi, renamed
#
# build/embed is the tree that programs are given: native/package.py packs it, and it is sfi_local/embed in the Python package.

set(SFI_EMBED OFF)
if (NOT (UNIX AND NOT APPLE) OR CMAKE_CXX_COMPILER_ID MATCHES "MSVC" OR NOT CMAKE_OBJCOPY OR NOT CMAKE_LINKER)
    message(STATUS "libsfi is not built: it is made of ELF objects with ld and objcopy.")
    return()
endif()
set(others ${SFI_BACKEND_TARGETS})
list(REMOVE_ITEM others ggml-rpc) # which it does without
if (others)
    message(STATUS "libsfi is not built: so far it is of the CPU alone, without ${others}.")
    return()
endif()
set(SFI_EMBED ON)

set(embed   "${CMAKE_CURRENT_SOURCE_DIR}/embed")
set(parts   "${CMAKE_BINARY_DIR}/libsfi")
set(SFI_EMBED_TREE "${CMAKE_BINARY_DIR}/embed")
file(MAKE_DIRECTORY "${parts}/cpu")

file(READ "${CMAKE_CURRENT_SOURCE_DIR}/include/sfi.h" header)
foreach (part MAJOR MINOR PATCH)
    string(REGEX MATCH "SFI_VERSION_${part} ([0-9]+)" _ "${header}")
    set(SFI_VERSION_${part} ${CMAKE_MATCH_1})
endforeach()
string(REGEX MATCH "SFI_SOVERSION ([0-9]+)" _ "${header}")
set(SFI_SOVERSION ${CMAKE_MATCH_1})
set(SFI_VERSION "${SFI_VERSION_MAJOR}.${SFI_VERSION_MINOR}.${SFI_VERSION_PATCH}")

# ---- headers and names ---------------------------------------------------------------------------------------------

set(names "${parts}/llama.names" "${parts}/libsfi.map")
file(GLOB ggml_headers "${SFI_TREE}/ggml/include/*.h")
add_custom_command(
    OUTPUT  ${names}
    COMMAND "${Python_EXECUTABLE}" "${embed}/headers.py" "${SFI_TREE}" "${SFI_EMBED_TREE}/include" "${parts}" ${SFI_HEADERS}
    COMMAND "${CMAKE_COMMAND}" -E touch ${names}  # headers.py leaves an equal file alone
    DEPENDS "${embed}/headers.py" "${SFI_TREE}/include/llama.h" ${ggml_headers} ${SFI_HEADERS}
    COMMENT "Generating the headers and names of libsfi" VERBATIM)

# ---- the parts -----------------------------------------------------------------------------------------------------

set(joined "")
set(variants "")
foreach (target IN LISTS SFI_CPU_TARGETS)
    string(REGEX REPLACE "^ggml-cpu-?" "" name "${target}")
    string(MAKE_C_IDENTIFIER "${name}" name)
    if (name STREQUAL "_" OR name STREQUAL "")
        set(name here)
    endif()
    list(APPEND variants ${name})
    set(objects "$<TARGET_OBJECTS:${target}>")
    if (TARGET ${target}-feats)
        list(APPEND objects "$<TARGET_OBJECTS:${target}-feats>")
    endif()
    set(out "${parts}/cpu/${name}.o")
    add_custom_command(
        OUTPUT  "${out}"
        COMMAND "${Python_EXECUTABLE}" "${embed}/join.py" "${CMAKE_LINKER}" "${CMAKE_NM}" "${CMAKE_OBJCOPY}" "${out}" ${name} ${objects}
        DEPENDS "${embed}/join.py" ${objects}
        COMMENT "Joining the kernels of ${target}" COMMAND_EXPAND_LISTS VERBATIM)
    list(APPEND joined "${out}")
endforeach()

set(objects "$<TARGET_OBJECTS:llama>")
add_custom_command(
    OUTPUT  "${parts}/llama.o"
    COMMAND "${CMAKE_LINKER}" -r -o "${parts}/llama.o" ${objects}
    COMMAND "${CMAKE_OBJCOPY}" "--redefine-syms=${parts}/llama.names" "${parts}/llama.o"
    DEPENDS ${objects} "${parts}/llama.names"
    COMMENT "Renaming the functions of llama.h" COMMAND_EXPAND_LISTS VERBATIM)
list(APPEND joined "${parts}/llama.o")

list(TRANSFORM variants REPLACE "(.+)" "X(\\1)" OUTPUT_VARIABLE x_variants)
list(JOIN x_variants " " x_variants)
set(choice "")
if (SFI_PORTABLE)
    set(choice "#define SFI_CPU_CHOICE // each has a score\n")
endif()
file(CONFIGURE OUTPUT "${parts}/generated/sfi-cpu-variants.h" CONTENT "${choice}#define SFI_CPU_VARIANTS(X) ${x_variants}\n" @ONLY)

# ---- the library ---------------------------------------------------------------------------------------------------

add_custom_target(sfi-parts DEPENDS ${joined} ${names})
add_dependencies(sfi-parts llama ggml ggml-base ${SFI_CPU_TARGETS})

set(own "${embed}/backend.cpp")
if (CMAKE_C_COMPILER_ID STREQUAL "GNU")
    list(APPEND own "${embed}/team.cpp")
endif()
# the backends that the other libraries have, or look for in files, are not in this one
set(registry "$<FILTER:$<TARGET_OBJECTS:ggml>,EXCLUDE,/ggml-backend-reg[.]>")
list(APPEND own "${SFI_TREE}/ggml/src/ggml-backend-reg.cpp")
add_library(sfi SHARED ${own} ${joined} "$<TARGET_OBJECTS:ggml-base>" ${registry})
add_dependencies(sfi sfi-parts)
set_source_files_properties(${joined} PROPERTIES EXTERNAL_OBJECT ON GENERATED ON)
set_source_files_properties("${SFI_TREE}/ggml/src/ggml-backend-reg.cpp" PROPERTIES COMPILE_DEFINITIONS "GGML_USE_CPU")
target_include_directories(sfi PRIVATE "${parts}/generated" "${embed}" "${CMAKE_CURRENT_SOURCE_DIR}/api" "${CMAKE_CURRENT_SOURCE_DIR}/llama"
    "${CMAKE_CURRENT_SOURCE_DIR}/include"
    "${SFI_TREE}/include" "${SFI_TREE}/ggml/include" "${SFI_TREE}/ggml/src")
target_compile_features(sfi PRIVATE cxx_std_17)
find_package(Threads REQUIRED)
target_link_libraries(sfi PRIVATE Threads::Threads m ${CMAKE_DL_LIBS})
if (NOT CMAKE_C_COMPILER_ID STREQUAL "GNU") # whose OpenMP calls other functions than team.cpp has
    find_package(OpenMP)
    if (OpenMP_CXX_FOUND)
        target_link_libraries(sfi PRIVATE OpenMP::OpenMP_CXX)
    endif()
endif()
target_link_options(sfi PRIVATE
    "LINKER:--version-script=${parts}/libsfi.map" "LINKER:-Bsymbolic" "LINKER:--no-undefined" "LINKER:-z,nodelete" "LINKER:--gc-sections"
    $<$<CONFIG:Release>:LINKER:-s> -static-libgcc -static-libstdc++)
set_target_properties(sfi PROPERTIES
    LINK_DEPENDS            "${parts}/libsfi.map"
    VERSION                 "${SFI_VERSION}"
    SOVERSION               "${SFI_SOVERSION}"
    BUILD_RPATH             ""
    SKIP_BUILD_RPATH        ON
    LIBRARY_OUTPUT_DIRECTORY "${SFI_EMBED_TREE}/lib")

# ---- the tree ------------------------------------------------------------------------------------------------------

include(CMakePackageConfigHelpers)
if (SFI_PORTABLE)
    set(SFI_BUILT_FOR "any ${CMAKE_SYSTEM_PROCESSOR} with ${CMAKE_SYSTEM_NAME}; the kernels for its CPU are chosen when it starts")
elseif (SFI_CPU_FLAGS)
    set(SFI_BUILT_FOR "a CPU with ${SFI_CPU_FLAGS_WORDS}")
else()
    set(SFI_BUILT_FOR "${CMAKE_SYSTEM_PROCESSOR} with ${CMAKE_SYSTEM_NAME}")
endif()
configure_file("${embed}/README.md.in"          "${SFI_EMBED_TREE}/README.md" @ONLY)
configure_file("${embed}/sfi.pc.in"             "${SFI_EMBED_TREE}/lib/pkgconfig/sfi.pc" @ONLY)
configure_file("${embed}/sfiConfig.cmake.in"    "${SFI_EMBED_TREE}/lib/cmake/sfi/sfiConfig.cmake" @ONLY)
write_basic_package_version_file("${SFI_EMBED_TREE}/lib/cmake/sfi/sfiConfigVersion.cmake" VERSION "${SFI_VERSION}" COMPATIBILITY SameMajorVersion)

set(copied "")
function(sfi_copy folder) # files...
    foreach (file IN LISTS ARGN)
        get_filename_component(name "${file}" NAME)
        set(to "${SFI_EMBED_TREE}/${folder}/${name}")
        add_custom_command(OUTPUT "${to}" COMMAND "${CMAKE_COMMAND}" -E copy "${file}" "${to}" DEPENDS "${file}" COMMENT "" VERBATIM)
        list(APPEND copied "${to}")
    endforeach()
    set(copied "${copied}" PARENT_SCOPE)
endfunction()
file(GLOB examples CONFIGURE_DEPENDS "${CMAKE_CURRENT_SOURCE_DIR}/examples/*.c" "${CMAKE_CURRENT_SOURCE_DIR}/examples/*.cpp" "${embed}/examples/*")
file(GLOB ask CONFIGURE_DEPENDS "${CMAKE_CURRENT_SOURCE_DIR}/examples/ask/*")
sfi_copy(examples ${examples})
sfi_copy(examples/ask ${ask})
sfi_copy(include ${SFI_HEADERS} "${CMAKE_CURRENT_SOURCE_DIR}/include/sfi.hpp")
file(GLOB licenses "${SFI_TREE}/licenses/*")
sfi_copy(licenses ${licenses})
add_custom_target(sfi-embed-tree ALL
    COMMAND "${CMAKE_COMMAND}" -E copy_if_different "${SFI_GENERATED}/sfi-source-id.h" "${SFI_EMBED_TREE}/include/sfi-source-id.h"
    COMMAND "${CMAKE_COMMAND}" -E copy_if_different "${SFI_ROOT}/LICENSE" "${SFI_EMBED_TREE}/licenses/LICENSE-sfi"
    COMMAND "${CMAKE_COMMAND}" -E copy_if_different "${SFI_TREE}/LICENSE" "${SFI_EMBED_TREE}/licenses/LICENSE-llama.cpp"
    DEPENDS ${copied} ${names} COMMENT "" VERBATIM)
add_dependencies(sfi-embed-tree sfi-source-id sfi)

# ---- install -------------------------------------------------------------------------------------------------------

if (SFI_PYTHON) # a wheel has no links: sfi_local/binding/embedding.py makes lib/libsfi.so
    set(SFI_EMBED_PREFIX sfi_local/embed)
    install(PROGRAMS "$<TARGET_FILE:sfi>" DESTINATION ${SFI_EMBED_PREFIX}/lib RENAME "libsfi.so.${SFI_SOVERSION}")
else()
    set(SFI_EMBED_PREFIX .)
    install(TARGETS sfi LIBRARY DESTINATION lib)
endif()
install(DIRECTORY "${SFI_EMBED_TREE}/" DESTINATION ${SFI_EMBED_PREFIX} PATTERN "libsfi.so*" EXCLUDE)
