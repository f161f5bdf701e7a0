// Records which functions of the CUDA driver a process calls, so that one can see whether a step waits for the GPU before its end:
// benchmarks/trace_steps.py. The driver loads this library if CUDA_INJECTION64_PATH names it.

#include <cupti.h>

#include <cstdio>
#include <cstring>
#include <mutex>
#include <string>
#include <vector>

namespace {

std::mutex                mutex;
bool                      on = false;
std::vector<const char *> calls; // in their order, while on

void CUPTIAPI callback(void *, CUpti_CallbackDomain domain, CUpti_CallbackId id, const void * data) {
    const std::lock_guard<std::mutex> lock(mutex);
    if (!on || ((const CUpti_CallbackData *) data)->callbackSite != CUPTI_API_ENTER) {
        return;
    }
    const char * name = nullptr;
    if (cuptiGetCallbackName(domain, id, &name) == CUPTI_SUCCESS && name) {
        calls.push_back(name);
    }
}

} // namespace

extern "C" int InitializeInjection(void) {
    CUpti_SubscriberHandle subscriber;
    const bool ok = cuptiSubscribe(&subscriber, callback, nullptr) == CUPTI_SUCCESS
        && cuptiEnableDomain(1, subscriber, CUPTI_CB_DOMAIN_DRIVER_API) == CUPTI_SUCCESS;
    if (!ok) {
        fprintf(stderr, "trace-cuda: CUPTI does not work here\n");
    }
    return ok;
}

extern "C" void sfi_trace_begin(void) {
    const std::lock_guard<std::mutex> lock(mutex);
    calls.clear();
    on = true;
}

// Writes the calls since sfi_trace_begin(), a line each. Returns the bytes that all of them need; n is the room for them.
extern "C" size_t sfi_trace_end(char * out, size_t n) {
    const std::lock_guard<std::mutex> lock(mutex);
    on = false;
    std::string text;
    for (const char * name : calls) {
        text += name;
        text += '\n';
    }
    if (text.size() < n) {
        memcpy(out, text.c_str(), text.size() + 1);
    }
    return text.size() + 1;
}
