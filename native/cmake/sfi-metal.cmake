# The Metal kernels as one text: Metal compiles them where they run, and finds no files there. sfi-kernels.metal is that text
# (the tests run it on a CPU), sfi-metal-text.h has it as a string.

function(sfi_write_metal_text folder)
    set(sources args.h gpu.metal top-k.metal sparse-attn.metal support.metal sketch-encode.metal sketch-scan.metal
        sketch-looks.metal)
    list(TRANSFORM sources PREPEND "${CMAKE_CURRENT_SOURCE_DIR}/ggml/metal/")
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
