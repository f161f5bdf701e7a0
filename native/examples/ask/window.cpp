#include "window.h"

#include "stalls.h"

#include <algorithm>
#include <cmath>
#include <utility>

namespace ask {

static constexpr int WIDTH = 760; // of what is read, in pixels

static const char * const STYLE = R"(
.talk, .talk text { background: transparent; }
.talk { font-size: 1.05em; }
.panel { padding: 14px 18px 18px 18px; }
.failure { padding: 10px 10px 10px 14px; border-radius: 9px; background: alpha(@error_color, 0.12); }
.measure { font-feature-settings: "tnum"; }
progressbar.reading > trough, progressbar.reading > trough > progress { min-height: 8px; border-radius: 4px; }
)";

static const char * const SUGGESTIONS[] = {"What is this text about?", "Summarise it in three sentences.", "What are its most important points?"};

// ---- small helpers -----------------------------------------------------------------------------------------------------

static double seconds() {
    return g_get_monotonic_time()/1e6;
}

static std::string format(const char * text, ...) {
    va_list arguments;
    va_start(arguments, text);
    char * made = g_strdup_vprintf(text, arguments);
    va_end(arguments);
    const std::string out = made;
    g_free(made);
    return out;
}

static std::string quoted(const std::string & text) { // as JSON
    std::string out = "\"";
    for (const unsigned char c : text) {
        out += c == '"' || c == '\\' ? std::string("\\") + (char) c : c < 0x20 ? format("\\u%04x", c) : std::string(1, (char) c);
    }
    return out + "\"";
}

static std::string file_name(const std::string & path) {
    char * name = g_path_get_basename(path.c_str());
    const std::string out = name;
    g_free(name);
    return out;
}

static std::string spoken(double s) {
    const int n = (int) std::ceil(s);
    return n < 60 ? format("%d s", n) : n < 3600 ? format("%d min %d s", n/60, n%60) : format("%d h %d min", n/3600, n/60%60);
}

static std::string one_line(const std::string & text) {
    std::string out;
    for (const char c : text) {
        const bool space = g_ascii_isspace(c);
        if (!space || (!out.empty() && out.back() != ' ')) {
            out += space ? ' ' : c;
        }
    }
    return out;
}

static GtkWidget * label(const char * text, const char * style, bool left = true) {
    GtkWidget * label = gtk_label_new(text);
    gtk_label_set_xalign(GTK_LABEL(label), left ? 0.0f : 1.0f);
    gtk_label_set_ellipsize(GTK_LABEL(label), PANGO_ELLIPSIZE_END);
    for (char ** name = g_strsplit(style, " ", -1), ** all = name; ; ++name) {
        if (!*name) {
            g_strfreev(all);
            return label;
        }
        gtk_widget_add_css_class(label, *name);
    }
}

static GtkWidget * box(GtkOrientation orientation, int spacing, std::initializer_list<GtkWidget *> children) {
    GtkWidget * box = gtk_box_new(orientation, spacing);
    for (GtkWidget * child : children) {
        gtk_box_append(GTK_BOX(box), child);
    }
    return box;
}

static GtkWidget * clamp(GtkWidget * child) {
    GtkWidget * clamp = adw_clamp_new();
    adw_clamp_set_maximum_size(ADW_CLAMP(clamp), WIDTH);
    adw_clamp_set_tightening_threshold(ADW_CLAMP(clamp), WIDTH);
    adw_clamp_set_child(ADW_CLAMP(clamp), child);
    return clamp;
}

using Handler = std::function<void()>;

static void when(gpointer object, const char * signal, Handler handler) {
    g_signal_connect_data(object, signal, G_CALLBACK(+[](gpointer, gpointer handler) {
        const Held held;
        (*static_cast<Handler *>(handler))();
    }),
                          new Handler(std::move(handler)), [](gpointer handler, GClosure *) { delete static_cast<Handler *>(handler); },
                          (GConnectFlags) 0);
}

static void turn_light_or_dark() {
    AdwStyleManager * style = adw_style_manager_get_default();
    adw_style_manager_set_color_scheme(style, adw_style_manager_get_dark(style) ? ADW_COLOR_SCHEME_FORCE_LIGHT : ADW_COLOR_SCHEME_FORCE_DARK);
}

static GtkWidget * push_button(const char * text, const char * style, Handler handler) {
    GtkWidget * button = gtk_button_new_with_mnemonic(text);
    gtk_widget_add_css_class(button, style);
    when(button, "clicked", std::move(handler));
    return button;
}

static GtkWidget * icon_button(const char * icon, const char * tip, Handler handler) {
    GtkWidget * button = gtk_button_new_from_icon_name(icon);
    gtk_widget_set_tooltip_text(button, tip);
    when(button, "clicked", std::move(handler));
    return button;
}

// ---- what it is made of ------------------------------------------------------------------------------------------------

Window::Window(GtkApplication * app, const Options & options)
    : options(options), app(app), window(adw_application_window_new(app)), strip([this](int part) { pointed = part; show_passage(part); }) {
    GtkCssProvider * style = gtk_css_provider_new();
    gtk_css_provider_load_from_data(style, STYLE, -1);
    gtk_style_context_add_provider_for_display(gdk_display_get_default(), GTK_STYLE_PROVIDER(style), GTK_STYLE_PROVIDER_PRIORITY_APPLICATION);
    g_object_unref(style);

    gtk_window_set_title(GTK_WINDOW(window), "Ask a document");
    gtk_window_set_default_size(GTK_WINDOW(window), 900, 720);
    pages = gtk_stack_new();
    gtk_stack_add_named(GTK_STACK(pages), start_page(), "start");
    gtk_stack_add_named(GTK_STACK(pages), talk_page(), "talk");
    gtk_widget_set_vexpand(pages, true);
    adw_application_window_set_content(ADW_APPLICATION_WINDOW(window), box(GTK_ORIENTATION_VERTICAL, 0, {header(), pages}));
    add_shortcuts();
    add_drop();
    g_signal_connect(window, "close-request", G_CALLBACK(+[](GtkWindow * window, gpointer self) -> gboolean {
        gtk_widget_hide(GTK_WIDGET(window)); // it is gone at once, whatever is still to be ended
        delete static_cast<Window *>(self);
        return false;
    }), this);

    reader = std::make_unique<Reader>([this] {
        g_idle_add_full(G_PRIORITY_DEFAULT_IDLE, [](gpointer self) -> gboolean {
            static_cast<Window *>(self)->take();
            return G_SOURCE_REMOVE;
        }, this, nullptr);
    }, options.n_ctx, options.memory);
    watch_main_loop();
    set_state(State::NOTHING);
    show_start("document-open-symbolic", "Ask a document", "Choose a model, a .gguf file; then open a text or drop it here.", false);
    if (!options.model.empty()) {
        open_model(options.model);
    }
    if (!options.text.empty()) {
        open_text(options.text);
    }
    gtk_window_present(GTK_WINDOW(window));
}

Window::~Window() {
    if (ticking) {
        g_source_remove(ticking);
    }
    reader.reset();
    while (g_idle_remove_by_data(this)) {
    }
    trace("closed");
}

GtkWidget * Window::header() {
    GtkWidget * bar = adw_header_bar_new();
    title = adw_window_title_new("Ask a document", "");
    adw_header_bar_set_title_widget(ADW_HEADER_BAR(bar), title);
    adw_header_bar_pack_start(ADW_HEADER_BAR(bar), icon_button("document-open-symbolic", "Open a text (Ctrl+O)", [this] { choose(false); }));
    adw_header_bar_pack_start(ADW_HEADER_BAR(bar), icon_button("applications-science-symbolic", "Choose a model (Ctrl+M)", [this] { choose(true); }));
    adw_header_bar_pack_end(ADW_HEADER_BAR(bar), icon_button("weather-clear-night-symbolic", "Light or dark (Ctrl+D)", turn_light_or_dark));
    renew_button = icon_button("edit-clear-all-symbolic", "New questions about this text (Ctrl+N)", [this] { renew(); });
    adw_header_bar_pack_end(ADW_HEADER_BAR(bar), renew_button);
    return bar;
}

GtkWidget * Window::start_page() {
    start = adw_status_page_new();
    start_progress = gtk_progress_bar_new();
    gtk_widget_add_css_class(start_progress, "reading");
    gtk_widget_set_size_request(start_progress, 320, -1);
    start_buttons = box(GTK_ORIENTATION_HORIZONTAL, 12, {push_button("Choose a model …", "pill", [this] { choose(true); }),
                                                         push_button("Open a text …", "pill", [this] { choose(false); })});
    load_button = push_button("_Load it all the same", "pill", [this] { open_model(std::string(large_path), true); });
    gtk_box_append(GTK_BOX(start_buttons), load_button);
    GtkWidget * child = box(GTK_ORIENTATION_VERTICAL, 0, {start_progress, start_buttons});
    gtk_widget_set_halign(child, GTK_ALIGN_CENTER);
    adw_status_page_set_child(ADW_STATUS_PAGE(start), child);
    return start;
}

GtkWidget * Window::hints() {
    GtkWidget * hints = adw_status_page_new();
    adw_status_page_set_icon_name(ADW_STATUS_PAGE(hints), "system-search-symbolic");
    adw_status_page_set_title(ADW_STATUS_PAGE(hints), "Ask about this text");
    adw_status_page_set_description(ADW_STATUS_PAGE(hints), "It is read once. Further questions begin at once.");
    GtkWidget * list = gtk_box_new(GTK_ORIENTATION_VERTICAL, 10);
    gtk_widget_set_halign(list, GTK_ALIGN_CENTER);
    for (const char * text : SUGGESTIONS) {
        gtk_box_append(GTK_BOX(list), push_button(text, "pill", [this, text] { ask(text); }));
    }
    adw_status_page_set_child(ADW_STATUS_PAGE(hints), list);
    gtk_widget_add_css_class(hints, "compact");
    return hints;
}

GtkWidget * Window::talk_page() {
    view = gtk_text_view_new();
    buffer = gtk_text_view_get_buffer(GTK_TEXT_VIEW(view));
    gtk_text_view_set_editable(GTK_TEXT_VIEW(view), false);
    gtk_text_view_set_cursor_visible(GTK_TEXT_VIEW(view), false);
    gtk_text_view_set_wrap_mode(GTK_TEXT_VIEW(view), GTK_WRAP_WORD_CHAR);
    gtk_text_view_set_left_margin(GTK_TEXT_VIEW(view), 18);
    gtk_text_view_set_right_margin(GTK_TEXT_VIEW(view), 18);
    gtk_text_view_set_bottom_margin(GTK_TEXT_VIEW(view), 18);
    gtk_widget_add_css_class(view, "talk");
    gtk_text_buffer_create_tag(buffer, "question", "weight", PANGO_WEIGHT_BOLD, "scale", 1.1, "pixels-above-lines", 20, "pixels-below-lines", 6, nullptr);
    gtk_text_buffer_create_tag(buffer, "answer", "pixels-inside-wrap", 5, "pixels-below-lines", 5, nullptr);
    gtk_text_buffer_create_tag(buffer, "note", "scale", 0.82, "foreground", "#8a8a8e", "pixels-above-lines", 6, nullptr);

    scrolled = gtk_scrolled_window_new();
    gtk_scrolled_window_set_policy(GTK_SCROLLED_WINDOW(scrolled), GTK_POLICY_NEVER, GTK_POLICY_AUTOMATIC);
    gtk_scrolled_window_set_child(GTK_SCROLLED_WINDOW(scrolled), view);
    talk_pages = gtk_stack_new();
    gtk_stack_add_named(GTK_STACK(talk_pages), hints(), "hints");
    gtk_stack_add_named(GTK_STACK(talk_pages), clamp(scrolled), "talk");
    gtk_widget_set_vexpand(talk_pages, true);
    return box(GTK_ORIENTATION_VERTICAL, 0, {talk_pages, gtk_separator_new(GTK_ORIENTATION_HORIZONTAL), clamp(panel())});
}

GtkWidget * Window::panel() {
    works = gtk_stack_new();
    gtk_stack_set_vhomogeneous(GTK_STACK(works), true);
    gtk_stack_add_named(GTK_STACK(works), reading_row(), "reading");
    gtk_stack_add_named(GTK_STACK(works), strip_row(), "strip");
    GtkWidget * panel = box(GTK_ORIENTATION_VERTICAL, 12, {works, error_card(), entry_row()});
    gtk_widget_add_css_class(panel, "panel");
    return panel;
}

GtkWidget * Window::reading_row() {
    reading_label = label("", "measure");
    left_label = label("", "measure dim-label", false);
    gtk_widget_set_hexpand(reading_label, true);
    read_on = push_button("Read on", "flat", [this] {
        set_state(State::READING);
        reader->read();
    });
    bar = gtk_progress_bar_new();
    gtk_widget_add_css_class(bar, "reading");
    GtkWidget * row = box(GTK_ORIENTATION_VERTICAL, 10, {box(GTK_ORIENTATION_HORIZONTAL, 12, {reading_label, left_label, read_on}), bar});
    gtk_widget_set_valign(row, GTK_ALIGN_CENTER);
    return row;
}

GtkWidget * Window::strip_row() {
    measures = label("", "measure");
    passage = label("", "caption dim-label");
    return box(GTK_ORIENTATION_VERTICAL, 8, {measures, strip.widget(), passage});
}

GtkWidget * Window::error_card() {
    error_label = gtk_label_new("");
    gtk_label_set_wrap(GTK_LABEL(error_label), true);
    gtk_label_set_xalign(GTK_LABEL(error_label), 0.0f);
    gtk_widget_set_hexpand(error_label, true);
    error = gtk_revealer_new();
    GtkWidget * close = icon_button("window-close-symbolic", "Close", [this] { gtk_revealer_set_reveal_child(GTK_REVEALER(error), false); });
    gtk_widget_add_css_class(close, "flat");
    gtk_widget_set_valign(close, GTK_ALIGN_CENTER);
    GtkWidget * card = box(GTK_ORIENTATION_HORIZONTAL, 12, {gtk_image_new_from_icon_name("dialog-warning-symbolic"), error_label, close});
    gtk_widget_add_css_class(card, "failure");
    gtk_revealer_set_child(GTK_REVEALER(error), card);
    return error;
}

GtkWidget * Window::entry_row() {
    entry = gtk_entry_new();
    gtk_entry_set_placeholder_text(GTK_ENTRY(entry), "Ask about this text");
    gtk_widget_set_hexpand(entry, true);
    when(entry, "activate", [this] { ask(); });
    button = push_button("Ask", "suggested-action", [this] { act(); });
    gtk_widget_set_size_request(button, 84, -1);
    return box(GTK_ORIENTATION_HORIZONTAL, 10, {entry, button});
}

void Window::add_shortcuts() {
    static const struct { const char * keys; void (*act)(Window *); } SHORTCUTS[] = {
        {"Escape",     [](Window * w) { w->stop(); }},
        {"<Control>o", [](Window * w) { w->choose(false); }},
        {"<Control>m", [](Window * w) { w->choose(true); }},
        {"<Control>n", [](Window * w) { w->renew(); }},
        {"<Control>d", [](Window *) { turn_light_or_dark(); }},
        {"<Control>w", [](Window * w) { gtk_window_close(GTK_WINDOW(w->window)); }},
        {"<Control>q", [](Window * w) { gtk_window_close(GTK_WINDOW(w->window)); }},
    };
    GtkEventController * controller = gtk_shortcut_controller_new();
    gtk_shortcut_controller_set_scope(GTK_SHORTCUT_CONTROLLER(controller), GTK_SHORTCUT_SCOPE_GLOBAL);
    gtk_event_controller_set_propagation_phase(controller, GTK_PHASE_CAPTURE);
    for (const auto & shortcut : SHORTCUTS) {
        auto * handler = new Handler([this, &shortcut] { shortcut.act(this); });
        GtkShortcutAction * action = gtk_callback_action_new([](GtkWidget *, GVariant *, gpointer handler) -> gboolean {
            const Held held;
            (*static_cast<Handler *>(handler))();
            return true;
        }, handler, [](gpointer handler) { delete static_cast<Handler *>(handler); });
        gtk_shortcut_controller_add_shortcut(GTK_SHORTCUT_CONTROLLER(controller),
                                             gtk_shortcut_new(gtk_shortcut_trigger_parse_string(shortcut.keys), action));
    }
    gtk_widget_add_controller(window, controller);
}

void Window::add_drop() {
    GtkDropTarget * drop = gtk_drop_target_new(G_TYPE_FILE, GDK_ACTION_COPY);
    g_signal_connect(drop, "drop", G_CALLBACK(+[](GtkDropTarget *, const GValue * value, double, double, gpointer self) -> gboolean {
        static_cast<Window *>(self)->open(G_FILE(g_value_get_object(value)));
        return true;
    }), this);
    gtk_widget_add_controller(window, GTK_EVENT_CONTROLLER(drop));
}

// ---- what people do ----------------------------------------------------------------------------------------------------

void Window::choose(bool model) {
    GtkFileChooserNative * chooser = gtk_file_chooser_native_new(model ? "Choose a model" : "Open a text", GTK_WINDOW(window),
                                                                 GTK_FILE_CHOOSER_ACTION_OPEN, "Open", "Cancel");
    gtk_native_dialog_set_modal(GTK_NATIVE_DIALOG(chooser), true);
    if (model) {
        GtkFileFilter * filter = gtk_file_filter_new();
        gtk_file_filter_set_name(filter, "Models (*.gguf)");
        gtk_file_filter_add_suffix(filter, "gguf");
        gtk_file_chooser_add_filter(GTK_FILE_CHOOSER(chooser), filter);
    }
    g_object_set_data(G_OBJECT(chooser), "model", GINT_TO_POINTER(model));
    g_signal_connect(chooser, "response", G_CALLBACK(+[](GtkNativeDialog * chooser, int response, gpointer self) {
        GFile * file = response == GTK_RESPONSE_ACCEPT ? gtk_file_chooser_get_file(GTK_FILE_CHOOSER(chooser)) : nullptr;
        if (file) {
            auto * window = static_cast<Window *>(self);
            const std::string path = g_file_peek_path(file) ? g_file_peek_path(file) : "";
            g_object_get_data(G_OBJECT(chooser), "model") ? window->open_model(path) : window->open_text(path);
            g_object_unref(file);
        }
        g_object_unref(chooser);
    }), this);
    gtk_native_dialog_show(GTK_NATIVE_DIALOG(chooser));
}

void Window::open(GFile * file) {
    const std::string path = g_file_peek_path(file) ? g_file_peek_path(file) : "";
    g_str_has_suffix(path.c_str(), ".gguf") ? open_model(path) : open_text(path);
}

void Window::open_model(const std::string & path, bool all_the_same) {
    reader->stop();
    model_path = path;
    set_state(State::LOADING);
    show_start("applications-science-symbolic", "Loading " + file_name(path), "", true);
    reader->load(path, all_the_same);
    if (!text_path.empty()) {
        reader->open(text_path); // by the new model
    }
}

void Window::open_text(const std::string & path) {
    if (model_path.empty()) {
        text_path = path;
        show_start("document-open-symbolic", file_name(path), "Choose a model that reads it, a .gguf file.", false);
        return;
    }
    if (state != State::LOADING) {
        reader->stop();
    }
    text_path = path;
    reader->open(path);
}

void Window::ask() {
    const std::string question = one_line(gtk_editable_get_text(GTK_EDITABLE(entry)));
    if (!question.empty()) {
        ask(question);
    }
}

void Window::ask(const std::string & question) {
    if ((state != State::IDLE && state != State::READING && state != State::PAUSED) || !waiting.empty()) {
        return;
    }
    gtk_revealer_set_reveal_child(GTK_REVEALER(error), false);
    gtk_editable_set_text(GTK_EDITABLE(entry), "");
    gtk_stack_set_visible_child_name(GTK_STACK(talk_pages), "talk");
    say("question", question + "\n");
    waiting = question;
    reader->ask(question);
    trace("asked", format("\"question\":%s", quoted(question).c_str()));
    stalls_since_last();
    set_state(state == State::IDLE ? State::ANSWERING : State::READING);
}

void Window::stop() {
    if (state == State::READING || state == State::ANSWERING) {
        reader->stop();
    }
}

void Window::act() {
    state == State::ANSWERING || state == State::READING ? stop() : ask();
}

void Window::renew() {
    if (state == State::ANSWERING) {
        reader->stop();
    }
    if (state == State::ANSWERING || state == State::IDLE) {
        reader->forget();
    }
}

void Window::show_passage(int part) {
    const int shown = part >= 0 ? part : pointed >= 0 ? pointed : strip.brightest();
    strip.mark(shown);
    const bool known = shown >= 0 && shown < (int) passages.size();
    gtk_label_set_text(GTK_LABEL(passage), known ? ("“" + one_line(passages[shown]) + "”").c_str() : "Lights up where the answer is reading");
}

// ---- what happens ------------------------------------------------------------------------------------------------------

void Window::take() {
    const Held held;
    for (const Event & event : reader->take()) {
        on(event);
    }
}

void Window::on(const Event & event) {
    switch (event.kind) {
        case Event::LOADING:  gtk_progress_bar_set_fraction(GTK_PROGRESS_BAR(start_progress), event.share); break;
        case Event::NEEDS:    on_needs(event); break;
        case Event::TOO_LARGE: on_too_large(event.text); break;
        case Event::OPENED:   on_opened(event); break;
        case Event::READING:
        case Event::FITTING:  on_progress(event); break;
        case Event::STEP:     on_step(event.step); break;
        case Event::ANSWERED: on_answered(event.answer); break;
        case Event::STOPPED:  on_stopped(); break;
        case Event::FAILED:   on_failed(event.text); break;
        case Event::LOADED:
            adw_window_title_set_subtitle(ADW_WINDOW_TITLE(title), event.text.c_str());
            show_start("document-open-symbolic", event.text, "Open a text, or drop it here.", false);
            set_state(State::NOTHING);
            trace("loaded", "\"model\":" + quoted(event.text));
            break;
        case Event::READ:
            trace_stalls("reading");
            trace("read", format("\"tokens\":%d,\"new\":%d", event.total, event.n));
            set_state(waiting.empty() ? State::IDLE : State::ANSWERING);
            break;
        case Event::FORGOT:
            gtk_text_buffer_set_text(buffer, "", 0);
            gtk_stack_set_visible_child_name(GTK_STACK(talk_pages), "hints");
            strip.clear((int) passages.size());
            show_passage(-1);
            trace("forgot");
            set_state(State::IDLE);
            break;
    }
}

void Window::on_needs(const Event & event) {
    show_start("applications-science-symbolic", "Loading " + file_name(model_path), event.text, true);
    trace("needs", format("\"weights\":%zu,\"least\":%zu,\"most\":%zu,\"n_most\":%d,\"text\":%s", event.need.weights, event.need.least,
                          event.need.most, event.need.n_most, quoted(event.text).c_str()));
}

void Window::on_too_large(const std::string & sentence) {
    large_path = std::exchange(model_path, "");
    set_state(State::NOTHING);
    show_start("dialog-warning-symbolic", "There is not enough memory for this model", sentence + " Close other programs, or choose a smaller model.", false);
    gtk_widget_set_visible(load_button, true);
    trace("too_large");
}

void Window::on_opened(const Event & event) {
    passages = event.passages;
    pace = {};
    waiting.clear();
    gtk_text_buffer_set_text(buffer, "", 0);
    gtk_stack_set_visible_child_name(GTK_STACK(talk_pages), "hints");
    gtk_stack_set_visible_child_name(GTK_STACK(pages), "talk");
    gtk_revealer_set_reveal_child(GTK_REVEALER(error), false);
    adw_window_title_set_title(ADW_WINDOW_TITLE(title), file_name(event.text).c_str());
    strip.clear((int) passages.size());
    show_passage(-1);
    trace("opened", format("\"tokens\":%d,\"n_ctx\":%d", event.total, event.n_ctx));
    stalls_since_last();
    set_state(State::READING);
    gtk_widget_grab_focus(entry);
}

void Window::on_progress(const Event & event) {
    if (event.kind == Event::FITTING) {
        gtk_label_set_text(GTK_LABEL(reading_label), "Getting ready to answer …");
        gtk_label_set_text(GTK_LABEL(left_label), "");
        gtk_progress_bar_set_fraction(GTK_PROGRESS_BAR(bar), 1.0);
        pace.total = 0;
        return;
    }
    const double now = seconds();
    if (pace.total == 0 || event.done < pace.done) {
        pace = {event.done, event.done, event.total, now, now};
    } else if (pace.done == pace.from) {
        trace_stalls("opening"); // a page is laid out and painted for the first time
    }
    pace.done = event.done;
    pace.at = now;
    trace("reading", format("\"done\":%d,\"total\":%d", event.done, event.total));
    tick();
}

// Between two reports the bar goes on at the pace of those before.
void Window::tick() {
    if (state != State::READING || pace.total == 0) {
        return;
    }
    const double rate = pace.done > pace.from ? (pace.done - pace.from)/(pace.at - pace.began) : 0;
    const double done = std::min<double>(pace.total, pace.done + std::min(256.0, rate*(seconds() - pace.at)));
    gtk_progress_bar_set_fraction(GTK_PROGRESS_BAR(bar), done/pace.total);
    gtk_label_set_text(GTK_LABEL(reading_label), format("Reading  %s of %s tokens", with_commas((long) done).c_str(), with_commas(pace.total).c_str()).c_str());
    gtk_label_set_text(GTK_LABEL(left_label), rate > 0 ? (spoken((pace.total - done)/rate) + " left").c_str() : "");
}

void Window::on_step(const Step & step) {
    if (state == State::READING) { // that a question had go on
        set_state(State::ANSWERING);
    }
    if (steps.n == 0) {
        steps.began = seconds();
    }
    steps.last = seconds();
    ++steps.n;
    steps.n_fast += step.fast;
    steps.share  += step.share;
    say("answer", step.text);
    if (!step.look.empty()) {
        strip.light(step.look);
        show_passage(-1);
    }
    say_measures();
    trace("token", "\"text\":" + quoted(step.text));
}

void Window::say_measures() {
    std::string text = "Ready";
    if (steps.n > 1) {
        text = format("<b>%.1f</b> tokens/s     <b>%.0f %%</b> of the text read for each", (steps.n - 1)/std::max(1e-6, steps.last - steps.began),
                      100*steps.share/steps.n);
        text += steps.n_fast ? format("     <b>%d</b> of %d steps fast", steps.n_fast, steps.n) : "     the text is short: all of it is read";
    } else if (state == State::ANSWERING) {
        text = "Reading the question …";
    }
    gtk_label_set_markup(GTK_LABEL(measures), text.c_str());
}

void Window::on_answered(const Answer & answer) {
    const std::string why = std::string(answer.end) == "stopped" ? "Stopped. " : std::string(answer.end) == "length" ? "Ended: long enough. "
                          : std::string(answer.end) == "context" ? "Ended: the context is full. " : "";
    say("note", format("\n%s%d tokens, %d new ones read\n", why.c_str(), answer.n_tokens, answer.n_new));
    trace_stalls("answering");
    trace("answered", format("\"tokens\":%d,\"new\":%d,\"end\":\"%s\",\"fast\":%d", answer.n_tokens, answer.n_new, answer.end, steps.n_fast));
    waiting.clear();
    set_state(State::IDLE);
}

void Window::on_stopped() {
    const bool reading = state == State::READING;
    if (!waiting.empty()) {
        say("note", "Stopped before the answer began.\n");
        gtk_editable_set_text(GTK_EDITABLE(entry), waiting.c_str());
        waiting.clear();
    }
    if (state == State::READING || state == State::ANSWERING) {
        set_state(reading ? State::PAUSED : State::IDLE);
    }
    trace("stopped", format("\"done\":%d", pace.done));
}

void Window::on_failed(const std::string & sentence) {
    waiting.clear();
    trace("failed", "\"text\":" + quoted(sentence));
    if (state == State::ANSWERING || state == State::READING) {
        set_state(state == State::ANSWERING ? State::IDLE : State::PAUSED);
        show_error(sentence);
        return;
    }
    const bool model = state == State::LOADING;
    model ? model_path.clear() : text_path.clear();
    set_state(State::NOTHING);
    show_start("dialog-warning-symbolic", model ? "This model cannot be used" : "This text cannot be opened", sentence, false);
}

// ---- what is shown -----------------------------------------------------------------------------------------------------

void Window::set_state(State now) {
    state = now;
    const bool works_now = state == State::READING || state == State::ANSWERING, ready = works_now || state == State::IDLE || state == State::PAUSED;
    gtk_button_set_label(GTK_BUTTON(button), works_now ? "Stop" : "Ask");
    (works_now ? gtk_widget_remove_css_class : gtk_widget_add_css_class)(button, "suggested-action");
    gtk_widget_set_sensitive(button, ready);
    gtk_widget_set_sensitive(entry, ready);
    gtk_widget_set_sensitive(renew_button, state == State::IDLE || state == State::ANSWERING);
    gtk_widget_set_visible(read_on, state == State::PAUSED);
    gtk_stack_set_visible_child_name(GTK_STACK(works), state == State::READING || state == State::PAUSED ? "reading" : "strip");
    if (state == State::PAUSED) {
        gtk_label_set_text(GTK_LABEL(left_label), "Stopped");
    }
    if (state == State::ANSWERING) {
        steps = {};
    }
    if (state == State::READING && !ticking) {
        ticking = g_timeout_add(100, [](gpointer self) -> gboolean {
            const Held held;
            auto * window = static_cast<Window *>(self);
            window->tick();
            window->ticking = window->state == State::READING ? window->ticking : 0;
            return window->ticking != 0;
        }, this);
    }
    say_measures();
}

void Window::say(const char * tag, const std::string & text) {
    GtkAdjustment * place = gtk_scrolled_window_get_vadjustment(GTK_SCROLLED_WINDOW(scrolled));
    const bool at_end = gtk_adjustment_get_value(place) + gtk_adjustment_get_page_size(place) > gtk_adjustment_get_upper(place) - 60;
    GtkTextIter end;
    gtk_text_buffer_get_end_iter(buffer, &end);
    gtk_text_buffer_insert_with_tags_by_name(buffer, &end, text.data(), (int) text.size(), tag, nullptr);
    if (at_end) { // who has scrolled up is left there
        gtk_text_buffer_get_end_iter(buffer, &end);
        GtkTextMark * mark = gtk_text_buffer_get_mark(buffer, "end");
        mark = mark ? mark : gtk_text_buffer_create_mark(buffer, "end", &end, false);
        gtk_text_buffer_move_mark(buffer, mark, &end);
        gtk_text_view_scroll_to_mark(GTK_TEXT_VIEW(view), mark, 0, true, 0, 1);
    }
}

void Window::show_error(const std::string & sentence) {
    gtk_label_set_text(GTK_LABEL(error_label), sentence.c_str());
    gtk_revealer_set_reveal_child(GTK_REVEALER(error), true);
}

void Window::show_start(const char * icon, const std::string & title, const std::string & text, bool progress) {
    adw_status_page_set_icon_name(ADW_STATUS_PAGE(start), icon);
    adw_status_page_set_title(ADW_STATUS_PAGE(start), title.c_str());
    adw_status_page_set_description(ADW_STATUS_PAGE(start), text.c_str());
    gtk_widget_set_visible(start_progress, progress);
    gtk_widget_set_visible(start_buttons, !progress);
    gtk_widget_set_visible(load_button, false);
    gtk_stack_set_visible_child_name(GTK_STACK(pages), "start");
}

void Window::trace(const char * event, const std::string & fields) {
    if (options.trace) {
        printf("{\"event\":\"%s\"%s%s}\n", event, fields.empty() ? "" : ",", fields.c_str());
        fflush(stdout);
    }
}

void Window::trace_stalls(const char * phase) {
    const Stalls found = stalls_since_last();
    trace("stalls", format("\"phase\":\"%s\",\"work_ms\":%.1f,\"held_ms\":%.1f,\"wall_ms\":%.1f", phase, found.work_ms,
                           found.held_ms, found.wall_ms));
}

} // namespace ask
