# The CPU variants of a portable build that this compiler can make. Upstream lists them all, and a compiler that does not know
# one feature (GCC 12 and sme) ends the build after most of its work.

include(CheckCSourceCompiles)

# Does the compiler know the instruction sets that a target asks for?
function(sfi_compiler_can target result)
    get_target_property(options ${target} COMPILE_OPTIONS)
    list(FILTER options INCLUDE REGEX "^-m")
    string(REPLACE ";" " " CMAKE_REQUIRED_FLAGS "${options}")
    string(MAKE_C_IDENTIFIER "SFI_COMPILER_CAN${CMAKE_REQUIRED_FLAGS}" variable)
    set(CMAKE_REQUIRED_QUIET ON)
    check_c_source_compiles("int main(void) { return 0; }" ${variable})
    set(${result} "${${variable}}" PARENT_SCOPE)
endfunction()

# Leave out a variant. ggml depends on its target, and CMake takes no dependency back, so the target stays as an empty library
# that lies where nobody looks for backends.
function(sfi_drop_variant target)
    get_target_property(options ${target} COMPILE_OPTIONS)
    list(FILTER options INCLUDE REGEX "^-m")
    message(STATUS "${target} is left out: ${CMAKE_C_COMPILER_ID} ${CMAKE_C_COMPILER_VERSION} does not know ${options}")
    set_target_properties(${target} PROPERTIES
        SOURCES                  "${CMAKE_CURRENT_FUNCTION_LIST_DIR}/empty.c"
        COMPILE_OPTIONS          ""
        LINK_LIBRARIES           ""
        LIBRARY_OUTPUT_DIRECTORY "${CMAKE_BINARY_DIR}/left-out")
endfunction()
