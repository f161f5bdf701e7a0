/* A window from which a file can be dragged: drag_source FILE. Says a line when it is there, and one when something took the file. */
#include <gtk/gtk.h>
#include <stdio.h>

static const char * path;

static GdkContentProvider * prepare(GtkDragSource * source, double x, double y, gpointer user) {
    (void) source; (void) x; (void) y; (void) user;
    GFile * file = g_file_new_for_path(path);
    GdkContentProvider * content = gdk_content_provider_new_typed(G_TYPE_FILE, file);
    g_object_unref(file);
    return content;
}

static void on_end(GtkDragSource * source, GdkDrag * drag, gboolean taken, gpointer user) {
    (void) source; (void) taken; (void) user;
    printf("{\"event\":\"dragged\",\"taken\":%s}\n", gdk_drag_get_selected_action(drag) ? "true" : "false");
    fflush(stdout);
}

static void activate(GtkApplication * app, gpointer user) {
    (void) user;
    GtkWidget * window = gtk_application_window_new(app), * label = gtk_label_new("Drag me");
    GtkDragSource * source = gtk_drag_source_new();
    g_signal_connect(source, "prepare", G_CALLBACK(prepare), NULL);
    g_signal_connect(source, "drag-end", G_CALLBACK(on_end), NULL);
    gtk_widget_add_controller(label, GTK_EVENT_CONTROLLER(source));
    gtk_window_set_title(GTK_WINDOW(window), "Drag source");
    gtk_window_set_default_size(GTK_WINDOW(window), 160, 120);
    gtk_window_set_child(GTK_WINDOW(window), label);
    gtk_window_present(GTK_WINDOW(window));
}

int main(int argc, char ** argv) {
    if (argc < 2) {
        return 2;
    }
    path = argv[1];
    GtkApplication * app = gtk_application_new(NULL, G_APPLICATION_NON_UNIQUE);
    g_signal_connect(app, "activate", G_CALLBACK(activate), NULL);
    return g_application_run(G_APPLICATION(app), 1, argv);
}
