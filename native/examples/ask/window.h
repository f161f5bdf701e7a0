// The window. What happens comes as events of the Reader, what is to be done goes to it; nothing here waits.
#pragma once

#include "reader.h"
#include "strip.h"

#include <adwaita.h>

namespace ask {

struct Options {
    std::string model, text;
    int  n_ctx = 0;
    size_t memory = 0; // bytes that model and text may take; 0: what is free
    bool trace = false; // what happens, when it is on the screen, as lines of JSON on stdout
};

class Window {
public:
    Window(GtkApplication * app, const Options & options);
    ~Window();

private:
    enum class State { NOTHING, LOADING, READING, PAUSED, IDLE, ANSWERING };

    // what it is made of
    GtkWidget * header();
    GtkWidget * start_page();
    GtkWidget * talk_page();
    GtkWidget * hints();
    GtkWidget * panel();
    GtkWidget * reading_row();
    GtkWidget * strip_row();
    GtkWidget * error_card();
    GtkWidget * entry_row();
    void add_shortcuts();
    void add_drop();

    // what people do
    void open_text(const std::string & path);
    void open_model(const std::string & path, bool all_the_same = false);
    void open(GFile * file); // dropped: a model by its name, else a text
    void choose(bool model);
    void ask();
    void ask(const std::string & question);
    void stop();
    void act();  // the button beside the question: asks or stops
    void renew(); // new questions about the same text
    void show_passage(int part);

    // what happens
    void take();
    void on(const Event & event);
    void on_needs(const Event & event);
    void on_too_large(const std::string & sentence);
    void on_opened(const Event & event);
    void on_progress(const Event & event);
    void on_step(const Step & step);
    void on_answered(const Answer & answer);
    void on_stopped();
    void on_failed(const std::string & sentence);
    void tick(); // ten times a second while it reads

    void set_state(State state);
    void say(const char * tag, const std::string & text);
    void say_measures();
    void show_error(const std::string & sentence);
    void show_start(const char * icon, const std::string & title, const std::string & text, bool progress);
    void trace(const char * event, const std::string & fields = "");
    void trace_stalls(const char * phase);

    const Options options;
    GtkApplication * app;
    GtkWidget * window, * title, * pages, * start, * start_progress, * start_buttons, * load_button, * talk_pages, * view, * scrolled, * works, * reading_label,
              * left_label, * read_on, * bar, * measures, * passage, * error, * error_label, * entry, * button, * renew_button;
    GtkTextBuffer * buffer;
    Strip strip;
    std::unique_ptr<Reader> reader;

    State state = State::NOTHING;
    std::string model_path, text_path;
    std::string large_path; // a model that was not loaded
    std::string waiting; // a question that is asked when the text was read
    std::vector<std::string> passages;
    int   pointed = -1;  // part of the strip under the pointer
    guint ticking = 0;
    struct { int from = 0, done = 0, total = 0; double began = 0, at = 0; } pace;
    struct { int n = 0, n_fast = 0; double share = 0, began = 0, last = 0; } steps;
};

} // namespace ask
