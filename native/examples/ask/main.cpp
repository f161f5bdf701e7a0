// sfi-ask [MODEL.gguf [TEXT]]: a window that answers questions about a long text.
#include "window.h"

static ask::Options options;

int main(int argc, char ** argv) {
    gboolean light = false, dark = false, trace = false;
    int n_ctx = 0, n_threads = 0, memory_mb = 0;
    const GOptionEntry entries[] = {
        {"ctx",     'c', 0, G_OPTION_ARG_INT,  &n_ctx,     "Tokens that the model may hold at most; 0: as many as it was trained with", "N"},
        {"threads", 't', 0, G_OPTION_ARG_INT,  &n_threads, "Threads that compute; 0: as many as the library takes", "N"},
        {"memory",  'm', 0, G_OPTION_ARG_INT,  &memory_mb, "Megabytes that model and text may take; 0: what is free", "N"},
        {"light",   0,   0, G_OPTION_ARG_NONE, &light,     "Light, whatever the desktop is", nullptr},
        {"dark",    0,   0, G_OPTION_ARG_NONE, &dark,      "Dark, likewise", nullptr},
        {"trace",   0,   0, G_OPTION_ARG_NONE, &trace,     "Say on stdout what happens, as lines of JSON", nullptr},
        {nullptr,   0,   0, G_OPTION_ARG_NONE, nullptr,    nullptr, nullptr},
    };
    GError * error = nullptr;
    GOptionContext * context = g_option_context_new("[MODEL.gguf [TEXT]]");
    g_option_context_add_main_entries(context, entries, nullptr);
    if (!g_option_context_parse(context, &argc, &argv, &error) || argc > 3 || n_ctx < 0 || n_threads < 0 || memory_mb < 0) {
        g_printerr("sfi-ask: %s: try --help\n", error ? error->message : "these arguments do not fit together");
        return 2;
    }
    g_option_context_free(context);
    options.model = argc > 1 ? argv[1] : "";
    options.text  = argc > 2 ? argv[2] : "";
    options.n_ctx = n_ctx;
    options.memory = memory_mb*(size_t) 1000000;
    options.trace = trace;

    struct sfi_init_params params = {};
    params.struct_size = sizeof(params);
    params.version     = SFI_VERSION;
    params.n_threads   = n_threads;
    if (sfi_init(&params) != SFI_OK) { // another version of the library, another processor
        g_printerr("sfi-ask: %s\n", sfi_last_error());
        return 1;
    }

    AdwApplication * app = adw_application_new("org.sfi_local.Ask", G_APPLICATION_NON_UNIQUE);
    adw_style_manager_set_color_scheme(adw_style_manager_get_default(), dark ? ADW_COLOR_SCHEME_FORCE_DARK
                                                                       : light ? ADW_COLOR_SCHEME_FORCE_LIGHT : ADW_COLOR_SCHEME_DEFAULT);
    g_signal_connect(app, "activate", G_CALLBACK(+[](GtkApplication * app, gpointer) { new ask::Window(app, options); }), nullptr);
    const int code = g_application_run(G_APPLICATION(app), 1, argv); // the options were taken above
    g_object_unref(app);
    return code;
}
