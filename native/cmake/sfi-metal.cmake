# The Metal kernels as one text: Metal compiles them where they run, and finds no files there. sfi-kernels.metal is that text
# (the tests run it on a CPU), sfi-metal-text.h has it as a string.

function(sfi_write_metal_text folder)
    set(sources sketch-layout.h gpu/args.h metal/kernels.h)
    foreach (name gpu top-k sparse-attn evidence select stability sketch-encode sketch-scan)
        list(APPEND sources metal/${name}.metal)
    endforeach()
    list(TRANSFORM sources PREPEND "${CMAKE_CURRENT_SOURCE_DIR}/ggml/")
    set_property(DIRECTORY APPEND PROPERTY CMAKE_CONFIGURE_DEPENDS ${sources})
    set(all "")
    foreach (source IN LISTS sources)
        get_filename_component(name "${source}" NAME)
        file(READ "${source}" text)
        string(REGEX REPLACE "#include \"[^\n]*|#pragma once" "" text "${text}")
        string(APPEND all "#line 1 \"${name}\"\n${text}")
    endforeach()
    file(CONFIGURE OUTPUT "${folder}/sfi-kernels.metal" CONTENT "${all}" @ONLY)
    file(CONFIGURE OUTPUT "${folder}/sfi-metal-text.h" @ONLY
        CONTENT "static const char sfi_metal_text[] = R\"metal(\n${all})metal\";\n")
endfunction()
