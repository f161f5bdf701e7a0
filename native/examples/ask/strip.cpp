#include "strip.h"

#include <algorithm>
#include <cmath>

namespace ask {

static constexpr int    HEIGHT = 34;
static constexpr double RADIUS = 7;
static constexpr float  AFTERGLOW = 0.75f; // of a look, that is left at the next

Strip::Strip(std::function<void(int)> picked) : area(gtk_drawing_area_new()), picked(std::move(picked)) {
    gtk_widget_set_size_request(area, -1, HEIGHT);
    gtk_widget_set_hexpand(area, true);
    gtk_widget_add_css_class(area, "strip");
    gtk_accessible_update_property(GTK_ACCESSIBLE(area), GTK_ACCESSIBLE_PROPERTY_LABEL, "Where in the text the answer is reading", -1);
    gtk_drawing_area_set_draw_func(GTK_DRAWING_AREA(area), [](GtkDrawingArea *, cairo_t * cr, int width, int height, void * self) {
        static_cast<Strip *>(self)->draw(cr, width, height);
    }, this, nullptr);
    GtkEventController * motion = gtk_event_controller_motion_new();
    g_signal_connect(motion, "motion", G_CALLBACK(+[](GtkEventControllerMotion *, double x, double, void * self) {
        static_cast<Strip *>(self)->picked(static_cast<Strip *>(self)->part_at(x));
    }), this);
    g_signal_connect(motion, "leave", G_CALLBACK(+[](GtkEventControllerMotion *, void * self) {
        static_cast<Strip *>(self)->picked(-1);
    }), this);
    gtk_widget_add_controller(area, motion);
}

void Strip::clear(int n_parts) {
    heat.assign(n_parts, 0.0f);
    marked = -1;
    gtk_widget_queue_draw(area);
}

void Strip::light(const std::vector<float> & parts) {
    for (size_t i = 0; i < heat.size() && i < parts.size(); ++i) {
        heat[i] = std::max(parts[i], AFTERGLOW*heat[i]);
    }
    gtk_widget_queue_draw(area);
}

int Strip::brightest() const {
    const auto most = std::max_element(heat.begin(), heat.end());
    return most == heat.end() || *most <= 0 ? -1 : (int) (most - heat.begin());
}

void Strip::mark(int part) {
    if (part != marked) {
        marked = part;
        gtk_widget_queue_draw(area);
    }
}

int Strip::part_at(double x) const {
    const int n = (int) heat.size(), width = gtk_widget_get_width(area);
    return n == 0 || width <= 0 ? -1 : std::clamp((int) (n*x/width), 0, n - 1);
}

static void rounded(cairo_t * cr, double x, double y, double w, double h, double r) {
    cairo_new_sub_path(cr);
    cairo_arc(cr, x + w - r, y + r,     r, -M_PI/2, 0);
    cairo_arc(cr, x + w - r, y + h - r, r, 0, M_PI/2);
    cairo_arc(cr, x + r,     y + h - r, r, M_PI/2, M_PI);
    cairo_arc(cr, x + r,     y + r,     r, M_PI, 3*M_PI/2);
    cairo_close_path(cr);
}

void Strip::draw(cairo_t * cr, int width, int height) const {
    GdkRGBA text, light = {0.2, 0.5, 0.9, 1};
    GtkStyleContext * style = gtk_widget_get_style_context(area);
    gtk_style_context_get_color(style, &text);
    gtk_style_context_lookup_color(style, "accent_color", &light);

    cairo_save(cr);
    rounded(cr, 0, 0, width, height, RADIUS);
    cairo_clip(cr);
    cairo_set_source_rgba(cr, text.red, text.green, text.blue, 0.08);
    cairo_paint(cr);
    const int n = (int) heat.size();
    for (int i = 0; i < n; ++i) {
        if (heat[i] > 0.02f) {
            const double left = std::round((double) width*i/n), right = std::round((double) width*(i + 1)/n);
            cairo_set_source_rgba(cr, light.red, light.green, light.blue, 0.10 + 0.90*std::pow(heat[i], 1.5));
            cairo_rectangle(cr, left, 0, right - left, height);
            cairo_fill(cr);
        }
    }
    cairo_restore(cr);
    if (marked >= 0 && n > 0) {
        const double w = std::max(5.0, (double) width/n + 2), x = std::clamp((marked + 0.5)*width/n - w/2, 1.0, width - w - 1);
        cairo_set_source_rgba(cr, text.red, text.green, text.blue, 0.9);
        cairo_set_line_width(cr, 2);
        rounded(cr, x, 1, w, height - 2, 2.5);
        cairo_stroke(cr);
    }
}

} // namespace ask
