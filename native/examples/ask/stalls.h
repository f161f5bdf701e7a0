// How long the window could not serve a key, a click or a frame: the longest of each since the last call of stalls_since_last().
#pragma once

namespace ask {

struct Stalls {
    double work_ms = 0; // processor time of the main thread between two waits of its loop: our code, and GTK that paints what it changed
    double held_ms = 0; // for which our code kept the loop: locks and files too, but not while the kernel had given the core to others
    double wall_ms = 0; // between two waits by the clock on the wall: with other programs, and waiting for a display server
};

void   watch_main_loop(); // from now on, on the thread that calls it
Stalls stalls_since_last();

class Held { // lives while our code runs in the main loop
public:
    Held();
    ~Held();
private:
    double began_ms;
};

} // namespace ask
