// The strip: the text from left to right, lit where the answer reads.
#pragma once

#include <gtk/gtk.h>

#include <functional>
#include <vector>

namespace ask {

class Strip {
public:
    Strip(std::function<void(int part)> picked); // the part under the pointer; -1: none
    GtkWidget * widget() const { return area; }

    void clear(int n_parts);
    void light(const std::vector<float> & parts); // 0 .. 1 of each
    int  brightest() const; // part; -1: none is lit
    void mark(int part);    // with a frame; -1: none

private:
    void draw(cairo_t * cr, int width, int height) const;
    int  part_at(double x) const;

    GtkWidget * area;
    std::function<void(int)> picked;
    std::vector<float> heat;
    int marked = -1;
};

} // namespace ask
