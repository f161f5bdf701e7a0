/*
 * A conversation in plain C.
 *
 *     chat MODEL.gguf [CELLS [FILE]]
 *
 * Every line of the input is a message; an empty one is left out. Ctrl-C stops an answer (or the reading of a long message), the end of
 * the input (Ctrl-D) ends the conversation. What was read stays in the context: of a new message only what is new is read. With a FILE the
 * conversation is kept in it when it ends, and goes on from there when there is one, without reading anything again.
 */
#include "sfi.h"

#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { MOST_MESSAGES = 256, MOST_TOKENS_OF_AN_ANSWER = 512 };

struct chat {
    struct llama_model *      model;
    struct llama_context *    lctx;
    struct llama_sampler *    sampler;
    struct sfi *              sfi;
    struct llama_chat_message messages[MOST_MESSAGES];
    size_t                    n_messages;
    llama_token *             held; /* the tokens in the context */
    int32_t                   n_held, n_cells;
    const char *              path; /* of the model */
};

/* ---- Ctrl-C ------------------------------------------------------------------------------------------------------------ */

static struct sfi * volatile running = NULL;

static void on_interrupt(int number) {
    (void) number;
    sfi_cancel(running); /* of NULL it does nothing */
}

/* ---- what is said on stderr -------------------------------------------------------------------------------------------- */

static void only_errors(enum ggml_log_level level, const char * text, void * user) {
    (void) user;
    if (level == GGML_LOG_LEVEL_ERROR) {
        fputs(text, stderr);
    }
}

static bool show_loading(float done, void * user) {
    (void) user;
    fprintf(stderr, "\rloading %3d %%", (int) (100*done));
    return true;
}

static bool show_reading(void * user, enum sfi_phase phase, int32_t done, int32_t total) {
    (void) user;
    fprintf(stderr, "\r%s %d of %d", phase == SFI_PHASE_PREFILL ? "reading" : "fitting layer", done, total);
    return true;
}

static void clear_line(void) {
    fprintf(stderr, "\r%40s\r", "");
}

static int complain(int err) {
    if (err < 0 && err != SFI_ERR_ABORTED) {
        fprintf(stderr, "%s: %s\n", sfi_status_name(err), sfi_last_error());
    }
    return err;
}

static void show_stats(const struct sfi * sfi) {
    struct sfi_stats s;
    s.struct_size = sizeof(s);
    if (sfi_get_stats(sfi, &s) == SFI_OK) {
        const long long n = (long long) (s.n_fast + s.n_slow + s.n_dense), us = (long long) (s.us_fast + s.us_slow + s.us_dense);
        fprintf(stderr, "%lld tokens read, %lld written, %lld of them by fast steps; %.1f tokens/s\n", (long long) s.n_prefill, n,
                (long long) s.n_fast, us > 0 ? 1e6*(double) n/(double) us : 0.0);
    }
}

/* ---- the text of a conversation ---------------------------------------------------------------------------------------- */

/* The conversation in the words of the model's template, with the beginning of an answer; NULL: out of memory, or an unknown template. */
static char * write_down(const struct chat * chat) {
    const char * form = llama_model_chat_template(chat->model, NULL);
    size_t size = 1024;
    for (size_t i = 0; i < chat->n_messages; ++i) {
        size += 2*(strlen(chat->messages[i].role) + strlen(chat->messages[i].content)) + 64;
    }
    for (;;) {
        char * text = malloc(size + 1);
        const int32_t n = text ? llama_chat_apply_template(form ? form : "chatml", chat->messages, chat->n_messages, true, text, (int32_t) size) : -1;
        if (n >= 0 && (size_t) n <= size) {
            text[n] = '\0';
            return text;
        }
        free(text);
        if (n < 0) {
            return NULL;
        }
        size = (size_t) n;
    }
}

static bool say(struct chat * chat, const char * role, const char * content) {
    char * copy = malloc(strlen(content) + 1);
    if (!copy || chat->n_messages == MOST_MESSAGES) {
        free(copy);
        fprintf(stderr, "the conversation is too long\n");
        return false;
    }
    strcpy(copy, content);
    chat->messages[chat->n_messages].role    = role;
    chat->messages[chat->n_messages].content = copy;
    ++chat->n_messages;
    return true;
}

/* ---- a turn -------------------------------------------------------------------------------------------------------------- */

/* Make the context hold these tokens: what it has in common with them stays, the rest is taken back and read. */
static int read_tokens(struct chat * chat, const llama_token * tokens, int32_t n) {
    int32_t same = 0;
    while (same < chat->n_held && same < n - 1 && chat->held[same] == tokens[same]) { /* one is read at least: its logits are needed */
        ++same;
    }
    int err = SFI_OK;
    if (same < chat->n_held) {
        err = sfi_rollback(chat->sfi, 0, chat->n_held - same);
    }
    if (!err) {
        chat->n_held = same;
        err = sfi_prefill(chat->sfi, 0, tokens + same, n - same, show_reading, NULL);
        clear_line();
        const int32_t depth = llama_memory_seq_pos_max(llama_get_memory(chat->lctx), 0) + 1; /* after Ctrl-C less than n */
        memcpy(chat->held + same, tokens + same, (size_t) (depth - same)*sizeof(llama_token));
        chat->n_held = depth;
    }
    return err;
}

static void show_piece(const struct llama_vocab * vocab, llama_token token, char * answer, size_t * length, size_t size) {
    char piece[256];
    const int32_t n = llama_token_to_piece(vocab, token, piece, sizeof(piece), 0, false);
    if (n > 0) {
        fwrite(piece, 1, (size_t) n, stdout);
        fflush(stdout);
        if (*length + (size_t) n < size) {
            memcpy(answer + *length, piece, (size_t) n);
            *length += (size_t) n;
        }
    }
}

static int answer(struct chat * chat) {
    const struct llama_vocab * vocab = llama_model_get_vocab(chat->model);
    char text[16*MOST_TOKENS_OF_AN_ANSWER];
    size_t length = 0;
    int err = SFI_OK;
    for (int i = 0; i < MOST_TOKENS_OF_AN_ANSWER && !err; ++i) {
        const llama_token token = llama_sampler_sample(chat->sampler, chat->lctx, -1);
        if (llama_vocab_is_eog(vocab, token)) {
            break;
        }
        show_piece(vocab, token, text, &length, sizeof(text) - 1);
        err = sfi_step(chat->sfi, 0, token, SFI_STEP_AUTO, NULL);
        if (!err) {
            chat->held[chat->n_held++] = token;
        }
    }
    putchar('\n');
    text[length] = '\0';
    return say(chat, "assistant", text) ? err : SFI_ERR_ARGUMENT;
}

static int turn(struct chat * chat) {
    char * text = write_down(chat);
    if (!text) {
        fprintf(stderr, "this model's chat template is not one of llama.cpp's\n");
        return SFI_ERR_MODEL;
    }
    const int32_t size = (int32_t) strlen(text);
    llama_token * tokens = malloc(((size_t) size + 8)*sizeof(llama_token));
    const int32_t n = tokens ? llama_tokenize(llama_model_get_vocab(chat->model), text, size, tokens, size + 8, true, true) : 0;
    running = chat->sfi;
    int err = n > 0 ? read_tokens(chat, tokens, n) : SFI_ERR_MEMORY;
    if (!err) {
        err = answer(chat);
    }
    running = NULL;
    free(tokens);
    free(text);
    return err == SFI_ERR_ABORTED ? SFI_OK : complain(err); /* the next turn goes on from what was read */
}

/* ---- a conversation that outlives the program ------------------------------------------------------------------------------ */

enum { ROWS_AT_ONCE = 256, LONGEST_MESSAGE = 1 << 24 };

struct kept { /* the beginning of the file; then messages, tokens, rows, state and the checksum of all that */
    char     source[64]; /* rows and state are of one build of the library */
    uint64_t model;      /* and of one model: the checksum of its file */
    int32_t  n_messages, n_held;
    int64_t  n_state;
};

struct file {
    FILE *   stream;
    bool     writes, ok;
    uint64_t sum;
};

/* n bytes into the file or out of it, so that what is written and what is read cannot differ in order. */
static void pass(struct file * file, void * bytes, size_t n) {
    if (file->ok && n > 0) {
        file->ok = bytes && (file->writes ? fwrite(bytes, 1, n, file->stream) : fread(bytes, 1, n, file->stream)) == n;
    }
    if (file->ok) {
        file->sum = sfi_checksum(file->sum, bytes, n);
    }
}

static uint64_t checksum_of(const char * path) {
    static char bytes[1 << 20];
    uint64_t sum = 0;
    FILE * stream = fopen(path, "rb");
    for (size_t n; stream && (n = fread(bytes, 1, sizeof(bytes), stream)) > 0; ) {
        sum = sfi_checksum(sum, bytes, n);
    }
    if (stream) {
        fclose(stream);
    }
    return sum;
}

static void pass_messages(struct chat * chat, struct file * file, int32_t n) {
    for (int32_t i = 0; i < n && file->ok; ++i) {
        int32_t answers = file->writes && strcmp(chat->messages[i].role, "assistant") == 0;
        int32_t length  = file->writes ? (int32_t) strlen(chat->messages[i].content) : 0;
        pass(file, &answers, sizeof(answers));
        pass(file, &length, sizeof(length));
        file->ok = file->ok && length >= 0 && length < LONGEST_MESSAGE;
        char * text = file->writes ? (char *) chat->messages[i].content : file->ok ? calloc((size_t) length + 1, 1) : NULL;
        pass(file, text, (size_t) length);
        if (!file->writes) {
            file->ok = file->ok && say(chat, answers ? "assistant" : "user", text);
            free(text);
        }
    }
}

static void pass_rows(struct chat * chat, struct file * file, int32_t n_held) {
    const int64_t most = sfi_rows_size(chat->lctx, ROWS_AT_ONCE);
    void * rows = most > 0 ? malloc((size_t) most) : NULL;
    file->ok = file->ok && rows;
    for (int32_t i = 0; i < n_held && file->ok; i += ROWS_AT_ONCE) {
        const int32_t n    = n_held - i < ROWS_AT_ONCE ? n_held - i : ROWS_AT_ONCE;
        const size_t  size = (size_t) sfi_rows_size(chat->lctx, n);
        file->ok = !file->writes || sfi_get_rows(chat->lctx, 0, i, n, rows, size) == SFI_OK;
        pass(file, rows, size);
        file->ok = file->ok && (file->writes || sfi_add_rows(chat->lctx, 0, chat->held + i, n, rows, n, size) == SFI_OK);
    }
    free(rows);
}

static void pass_state(struct chat * chat, struct file * file, int64_t n) {
    void * state = n > 0 && n < INT32_MAX ? malloc((size_t) n) : NULL;
    file->ok = file->ok && n >= 0 && (state || n == 0);
    if (file->ok && n > 0) {
        file->ok = !file->writes || sfi_get_state(chat->sfi, 0, state, (size_t) n) == SFI_OK;
        pass(file, state, (size_t) n);
        if (file->ok && !file->writes) {
            sfi_set_state(chat->sfi, 0, state, (size_t) n); /* where it does not serve, the next step is slow */
        }
    }
    free(state);
}

static bool pass_chat(struct chat * chat, struct file * file) {
    struct kept ours, kept;
    memset(&ours, 0, sizeof(ours));
    strncpy(ours.source, sfi_source_id(), sizeof(ours.source) - 1);
    ours.model      = checksum_of(chat->path);
    ours.n_messages = (int32_t) chat->n_messages;
    ours.n_held     = chat->n_held;
    ours.n_state    = sfi_state_size(chat->sfi, 0);
    kept = ours;
    pass(file, &kept, sizeof(kept));
    file->ok = file->ok && memcmp(kept.source, ours.source, sizeof(kept.source)) == 0 && kept.model == ours.model
            && kept.n_held >= 0 && kept.n_held < chat->n_cells;
    pass_messages(chat, file, kept.n_messages);
    pass(file, chat->held, file->ok ? (size_t) kept.n_held*sizeof(llama_token) : 0);
    pass_rows(chat, file, kept.n_held);
    pass_state(chat, file, kept.n_state);
    const uint64_t sum = file->sum;
    uint64_t told = sum;
    pass(file, &told, sizeof(told));
    file->ok = file->ok && told == sum;
    chat->n_held = file->ok ? kept.n_held : chat->n_held;
    return file->ok;
}

static void forget(struct chat * chat) {
    while (chat->n_messages > 0) {
        free((void *) chat->messages[--chat->n_messages].content);
    }
    chat->n_held = 0;
}

/* Where there is a file of another model, another build, more tokens than cells, or a broken one: a new conversation. */
static void take_up(struct chat * chat, const char * path) {
    struct file file = { fopen(path, "rb"), false, true, 0 };
    if (!file.stream) {
        return;
    }
    if (pass_chat(chat, &file)) {
        fprintf(stderr, "%d tokens of %d messages are there again\n", chat->n_held, (int) chat->n_messages);
    } else {
        fprintf(stderr, "%s is not a conversation with this model that this context and library can go on with: a new one begins\n", path);
        llama_memory_clear(llama_get_memory(chat->lctx), true);
        forget(chat);
    }
    fclose(file.stream);
}

/* The old file stays as it is until the new one is whole. */
static int keep(struct chat * chat, const char * path) {
    char * fresh = malloc(strlen(path) + 5);
    if (!fresh) {
        return SFI_ERR_MEMORY;
    }
    strcat(strcpy(fresh, path), ".new");
    struct file file = { fopen(fresh, "wb"), true, true, 0 };
    file.ok = file.stream && pass_chat(chat, &file);
    file.ok = file.stream && fclose(file.stream) == 0 && file.ok;
    if (!file.ok || rename(fresh, path)) {
        fprintf(stderr, "%s could not be written: is there room, and may you write there? The conversation is not kept\n", path);
        remove(fresh);
        file.ok = false;
    }
    free(fresh);
    return file.ok ? SFI_OK : SFI_ERR_ARGUMENT;
}

/* ---- the whole ------------------------------------------------------------------------------------------------------------ */

/* One line of any length without its end, or NULL. */
static char * read_line(FILE * file) {
    size_t size = 256, n = 0;
    char * line = malloc(size);
    while (line && fgets(line + n, (int) (size - n), file)) {
        n += strlen(line + n);
        if (n > 0 && line[n - 1] == '\n') {
            line[n - 1] = '\0';
            return line;
        }
        char * longer = realloc(line, size *= 2);
        if (!longer) {
            free(line);
        }
        line = longer;
    }
    if (line && n > 0) {
        return line;
    }
    free(line);
    return NULL;
}

static int open_chat(struct chat * chat) {
    struct llama_context_params cparams = llama_context_default_params();
    cparams.n_ctx           = (uint32_t) chat->n_cells;
    cparams.flash_attn_type = LLAMA_FLASH_ATTN_TYPE_ENABLED;

    struct sfi_bytes bytes;
    bytes.struct_size = sizeof(bytes);
    if (sfi_context_bytes(chat->model, &cparams, NULL, &bytes) == SFI_OK) { /* before anything of that size is allocated */
        fprintf(stderr, "%d cells take %.0f MB beside the model\n", chat->n_cells, (double) (bytes.kv + bytes.sfi + bytes.compute)/1e6);
    }
    chat->lctx = llama_init_from_model(chat->model, cparams);
    const int err = complain(sfi_attach(chat->lctx, NULL, &chat->sfi));
    if (!err) {
        chat->n_cells = (int32_t) llama_n_ctx_seq(chat->lctx); /* it may be a little more */
    }
    chat->held    = malloc((size_t) chat->n_cells*sizeof(llama_token));
    chat->sampler = llama_sampler_chain_init(llama_sampler_chain_default_params());
    llama_sampler_chain_add(chat->sampler, llama_sampler_init_min_p(0.05f, 1));
    llama_sampler_chain_add(chat->sampler, llama_sampler_init_temp(0.6f));
    llama_sampler_chain_add(chat->sampler, llama_sampler_init_dist(1));
    return err ? err : chat->held ? SFI_OK : SFI_ERR_MEMORY;
}

static void close_chat(struct chat * chat) {
    llama_sampler_free(chat->sampler);
    sfi_free(chat->sfi);
    llama_free(chat->lctx);
    llama_model_free(chat->model);
    forget(chat);
    free(chat->held);
}

int main(int argc, char ** argv) {
    static struct chat chat; /* all zeros */
    const char * file = argc > 3 ? argv[3] : NULL;
    chat.n_cells = argc > 2 ? atoi(argv[2]) : 8192;
    chat.path    = argv[1];
    if (argc < 2 || chat.n_cells < 1) {
        fprintf(stderr, "usage: %s MODEL.gguf [CELLS [FILE]]\n", argv[0]);
        return 2;
    }
    sfi_log_set(only_errors, NULL);
    if (complain(sfi_init(NULL))) {
        return 1;
    }
    struct llama_model_params mparams = llama_model_default_params();
    mparams.progress_callback = show_loading;
    chat.model = llama_model_load_from_file(argv[1], mparams);
    clear_line();
    int err = chat.model ? open_chat(&chat) : SFI_ERR_MODEL;
    signal(SIGINT, on_interrupt);
    if (!err && file) {
        take_up(&chat, file);
    }

    char * line;
    while (!err && (fputs("> ", stderr), (line = read_line(stdin)))) {
        if (*line) {
            err = say(&chat, "user", line) ? turn(&chat) : SFI_ERR_ARGUMENT;
        }
        free(line);
    }
    if (chat.sfi) {
        show_stats(chat.sfi);
    }
    if (!err && file && chat.n_held > 0) {
        err = keep(&chat, file);
    }
    close_chat(&chat);
    return err ? 1 : 0;
}
