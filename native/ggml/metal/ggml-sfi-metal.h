// The operations of ggml-sfi.h on Metal, as ggml-metal calls them.

#pragma once

#include "ggml-metal-device.h"

#ifdef __cplusplus
extern "C" {
#endif

bool   ggml_metal_sfi_supported(ggml_metal_device_t dev, const struct ggml_tensor * dst);
size_t ggml_metal_sfi_extra    (const struct ggml_tensor * dst); // bytes that follow the result in its buffer
bool   ggml_metal_sfi_encode   (ggml_metal_device_t dev, ggml_metal_encoder_t enc, const struct ggml_tensor * dst); // false: not one of ours

#ifdef __cplusplus
}
#endif
