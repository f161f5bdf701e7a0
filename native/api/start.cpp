// sfi_init(): what a program may settle before anything else.

#include "start.h"

#include "cores.h"
#include "grown.h"

#include <atomic>
#include <cstring>

static std::atomic<int32_t> n_threads{0}, n_spin{0};

int32_t start_threads() {
    const int32_t n = n_threads;
    return n > 0 ? n : sfi_threads();
}

int32_t start_spin() {
    return n_spin;
}

int32_t sfi_threads(void) {
    static const int32_t n = [] {
        try {
            return choose_threads("", usable_cpus());
        } catch (...) {
            return (int32_t) 1;
        }
    }();
    return n;
}

// A library serves programs that were built with it or with one before it.
static int check_version(int32_t theirs) {
    if (theirs/10000 == SFI_VERSION_MAJOR && theirs <= SFI_VERSION) {
        return SFI_OK;
    }
    return fail(SFI_ERR_VERSION, "This program was built for version %d.%d.%d of libsfi and runs on %d.%d.%d: install the version that it was "
        "built for, or build it again with this one's headers.",
        theirs/10000, theirs/100%100, theirs%100, SFI_VERSION_MAJOR, SFI_VERSION_MINOR, SFI_VERSION_PATCH);
}

int sfi_init(const struct sfi_init_params * params) {
    return no_throw([&] {
        sfi_init_params ours = { sizeof(ours), SFI_VERSION, 0, 0 };
        if (params) {
            if (params->struct_size >= offsetof(sfi_init_params, n_threads)) { // first: of a newer one the fields are not known
                if (const int err = check_version(params->version)) {
                    return err;
                }
            }
            if (const int err = check_struct(params, "params")) {
                return err;
            }
            if (const int err = take(params, ours, "params")) {
                return err;
            }
        }
        if (const int err = check_range("n_threads", ours.n_threads, 0, 512)) {
            return err;
        }
        if (const int err = check_range("n_spin", ours.n_spin, 0, 1 << 30)) {
            return err;
        }
        if (const int err = check_cpu()) {
            return err;
        }
        n_threads = ours.n_threads;
        n_spin    = ours.n_spin;
        return (int) SFI_OK;
    });
}
