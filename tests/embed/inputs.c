/* What a program does to a library: threads, forks, signals, limits, a cancel. inputs WHAT MODEL.gguf; prints what it found, exit code 1 and a
 * sentence where it is not as it should be. */
#define _GNU_SOURCE
#include "sfi.h"

#include <errno.h>
#include <locale.h>
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/time.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

enum { N_PROMPT = 300, N_STEPS = 12 };

struct talk {
    struct llama_context * lctx;
    struct sfi * sfi;
    llama_token  told[N_STEPS];
};

static struct llama_model * model;

static void quiet(enum ggml_log_level level, const char * text, void * user) {
    (void) level; (void) text; (void) user;
}

static void need(bool ok, const char * what) {
    if (!ok) {
        printf("FAILED: %s (%s)\n", what, sfi_last_error());
        fflush(stdout);
        _exit(1);
    }
}

static void begin(struct talk * t, uint32_t n_ctx) {
    struct llama_context_params p = llama_context_default_params();
    p.n_ctx           = n_ctx;
    p.flash_attn_type = LLAMA_FLASH_ATTN_TYPE_ENABLED;
    t->lctx = llama_init_from_model(model, p);
    need(sfi_attach(t->lctx, NULL, &t->sfi) == SFI_OK, "attach");
}

static void end(struct talk * t) {
    sfi_free(t->sfi);
    llama_free(t->lctx);
}

static llama_token likeliest(struct llama_context * lctx) {
    const float * logits = llama_get_logits_ith(lctx, -1);
    llama_token best = 0;
    for (llama_token i = 1; i < llama_vocab_n_tokens(llama_model_get_vocab(model)); ++i) {
        best = logits[i] > logits[best] ? i : best;
    }
    return best;
}

static int prefill(struct talk * t, int32_t n, sfi_progress_fn progress, void * user) {
    llama_token * prompt = malloc((size_t) n*sizeof(llama_token));
    need(prompt, "memory");
    for (int32_t i = 0; i < n; ++i) {
        prompt[i] = 100 + i*37%3000;
    }
    const int err = sfi_prefill(t->sfi, 0, prompt, n, progress, user);
    free(prompt);
    return err;
}

static void go_on(struct talk * t) {
    for (int i = 0; i < N_STEPS; ++i) {
        t->told[i] = likeliest(t->lctx);
        need(sfi_step(t->sfi, 0, t->told[i], SFI_STEP_AUTO, NULL) == SFI_OK, "step");
    }
}

static void * talk(void * p) {
    struct talk * t = p;
    begin(t, 1024);
    need(prefill(t, N_PROMPT, NULL, NULL) == SFI_OK, "prefill");
    go_on(t);
    end(t);
    return NULL;
}

static void same(const struct talk * a, const struct talk * b, const char * what) {
    need(memcmp(a->told, b->told, sizeof(a->told)) == 0, what);
}

static double now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double) t.tv_sec + 1e-9*(double) t.tv_nsec;
}

/* ---- what is tried -------------------------------------------------------------------------------------------------- */

static void plainly(void) {
    struct talk t;
    talk(&t);
    for (int i = 0; i < N_STEPS; ++i) {
        printf("%d ", t.told[i]);
    }
    printf("\n");
}

static void two_threads(void) {
    struct talk alone, t[2];
    pthread_t threads[2];
    talk(&alone);
    for (int i = 0; i < 2; ++i) {
        need(pthread_create(&threads[i], NULL, talk, &t[i]) == 0, "thread");
    }
    for (int i = 0; i < 2; ++i) {
        pthread_join(threads[i], NULL);
        same(&alone, &t[i], "a thread beside another tells something else");
    }
}

/* The parent's threads are not there in the child, which goes on with the same context, and with one of its own. */
static void forked(void) {
    struct talk alone, t, own;
    talk(&alone);
    begin(&t, 1024);
    need(prefill(&t, N_PROMPT, NULL, NULL) == SFI_OK, "prefill");
    const pid_t child = fork();
    if (child == 0) {
        go_on(&t);
        same(&alone, &t, "the child tells something else");
        talk(&own);
        same(&alone, &own, "a new context of the child tells something else");
        exit(0);
    }
    int status = 1;
    need(waitpid(child, &status, 0) == child && WIFEXITED(status) && WEXITSTATUS(status) == 0, "the child");
    talk(&own);
    same(&alone, &own, "the parent tells something else after the child");
}

static volatile sig_atomic_t n_alarms, n_elsewhere;
static pthread_t main_thread;

static void on_alarm(int number) {
    (void) number;
    ++n_alarms;
    n_elsewhere += !pthread_equal(pthread_self(), main_thread);
}

static void signals(void) {
    struct talk alone, t;
    struct sigaction action, after;
    memset(&action, 0, sizeof(action));
    action.sa_handler = on_alarm;
    main_thread = pthread_self();
    talk(&alone);
    sigaction(SIGALRM, &action, NULL);
    const struct itimerval often = { { 0, 500 }, { 0, 500 } }, never = { { 0, 0 }, { 0, 0 } };
    setitimer(ITIMER_REAL, &often, NULL);
    talk(&t);
    setitimer(ITIMER_REAL, &never, NULL);
    same(&alone, &t, "with signals something else is told");
    sigaction(SIGALRM, NULL, &after);
    need(after.sa_handler == on_alarm, "the handler is another one");
    need(n_alarms > 3 && n_elsewhere == 0, "a thread of the library took a signal of the program");
}

static void on_interrupt(int number) {
    (void) number;
    exit(7);
}

static bool interrupt_early(void * user, enum sfi_phase phase, int32_t done, int32_t total) {
    (void) user; (void) phase; (void) done; (void) total;
    const struct itimerval soon = { { 0, 0 }, { 0, 5000 } };
    setitimer(ITIMER_REAL, &soon, NULL);
    return true;
}

/* exit() in a handler, while other threads compute: they are not waited for */
static void exits(void) {
    struct talk t;
    signal(SIGALRM, on_interrupt);
    begin(&t, 4096);
    interrupt_early(NULL, SFI_PHASE_PREFILL, 0, 0);
    prefill(&t, 3000, NULL, NULL);
    need(false, "it was not interrupted");
}

static void comma(void) {
    struct talk alone, t;
    talk(&alone);
    need(setlocale(LC_ALL, "") && localeconv()->decimal_point[0] == ',', "the locale");
    talk(&t);
    same(&alone, &t, "with a decimal comma something else is told");
    need(sfi_threads() > 0 && strtod("1,5", NULL) > 1.4, "the locale is another one");
}

/* The address space ends: a sentence for each, no crash. */
static void little_memory(void) {
    struct talk t;
    talk(&t);
    FILE * file = fopen("/proc/self/statm", "r");
    long pages = 0;
    need(file && fscanf(file, "%ld", &pages) == 1, "statm");
    fclose(file);
    const struct rlimit limit = { (rlim_t) pages*4096 + (256 << 20), RLIM_INFINITY }, none = { RLIM_INFINITY, RLIM_INFINITY };
    need(setrlimit(RLIMIT_AS, &limit) == 0, "setrlimit");
    struct llama_context_params p = llama_context_default_params();
    p.n_ctx           = 1 << 17;
    p.flash_attn_type = LLAMA_FLASH_ATTN_TYPE_ENABLED;
    struct llama_context * lctx = llama_init_from_model(model, p);
    struct sfi * s = NULL;
    const int err = sfi_attach(lctx, NULL, &s);
    need(err < 0 && strlen(sfi_last_error()) > 20, "131072 cells were found in 256 MB");
    printf("%s\n", sfi_last_error());
    sfi_free(s);
    llama_free(lctx);
    need(setrlimit(RLIMIT_AS, &none) == 0, "setrlimit");
    talk(&t); /* and it works again */
}

struct stopper {
    struct talk * t;
    double after, at; /* seconds; when it was stopped */
};

static void * stop(void * p) {
    struct stopper * s = p;
    struct timespec pause = { (time_t) s->after, (long) (1e9*(s->after - (double) (time_t) s->after)) };
    nanosleep(&pause, NULL);
    s->at = now();
    sfi_cancel(s->t->sfi);
    return NULL;
}

static double cancelled_after(struct talk * t, int32_t n, double after) {
    struct stopper s = { t, after, 0 };
    pthread_t thread;
    need(pthread_create(&thread, NULL, stop, &s) == 0, "thread");
    const int err = prefill(t, n, NULL, NULL);
    const double end = now();
    pthread_join(thread, NULL);
    need(err == SFI_ERR_ABORTED, "the prefill was not stopped");
    return 1e3*(end - s.at);
}

/* From another thread: how long a prefill goes on; then it works again. argv[3]: tokens, argv[4]: seconds before it is stopped */
static void cancel(int32_t n, double after) {
    struct talk t;
    begin(&t, (uint32_t) n + 64);
    double most = 0;
    for (int i = 0; i < 5; ++i) {
        const double ms = cancelled_after(&t, n, after*(1 + 0.1*i));
        most = ms > most ? ms : most;
        llama_memory_seq_rm(llama_get_memory(t.lctx), 0, 0, -1);
    }
    printf("cancelled within %.0f ms\n", most);
    need(prefill(&t, 16, NULL, NULL) == SFI_OK, "the next call");
    end(&t);
}

static int rising(const void * a, const void * b) {
    const double x = *(const double *) a, y = *(const double *) b;
    return (x > y) - (x < y);
}

enum { N_STOPS = 8, N_TRIES = 48 };

/* From another thread at a moment of each step: how long the call goes on, beside how long a step takes. A step that was stopped is taken
 * again, slow then, and what is told is what steps of these kinds tell undisturbed. */
static void cancel_steps(int32_t n_prompt) {
    struct talk t[2];
    struct sfi_step_info info;
    double step[N_TRIES], stopped[N_STOPS], fastest = 0.004;
    int n_stopped = 0, n = 0;
    for (int i = 0; i < 2; ++i) {
        begin(&t[i], (uint32_t) n_prompt + 64);
        need(prefill(&t[i], n_prompt, NULL, NULL) == SFI_OK, "prefill");
    }
    info.struct_size = sizeof(info);
    for (; n < N_TRIES && n_stopped < N_STOPS; ++n) {
        struct stopper s = { &t[0], fastest*(1 + n%6)/10, 0 }; /* one that comes too late does nothing */
        pthread_t thread;
        const llama_token token = likeliest(t[0].lctx);
        need(likeliest(t[1].lctx) == token, "after stops something else is told");
        need(pthread_create(&thread, NULL, stop, &s) == 0, "thread");
        int err = sfi_step(t[0].sfi, 0, token, SFI_STEP_AUTO, &info);
        const double end = now();
        pthread_join(thread, NULL);
        if (err == SFI_ERR_ABORTED) {
            stopped[n_stopped++] = end - s.at;
            err = sfi_step(t[0].sfi, 0, token, SFI_STEP_AUTO, &info);
        }
        need(err == SFI_OK, "a step that was stopped, again");
        need(info.kind == SFI_STEP_FAST || sfi_invalidate(t[1].sfi, 0) == SFI_OK, "invalidate");
        need(sfi_step(t[1].sfi, 0, token, info.kind, &info) == SFI_OK, "step");
        step[n] = 1e-6*(double) info.t_us;
        fastest = n == 0 || step[n] < fastest ? step[n] : fastest;
    }
    need(n_stopped == N_STOPS, "too few steps were stopped");
    qsort(stopped, (size_t) n_stopped, sizeof(double), rising);
    qsort(step, (size_t) n, sizeof(double), rising);
    printf("%d of %d steps stopped, %.1f ms after the cancel in the median, %.1f at most; a step takes %.1f\n", n_stopped, n,
           1e3*stopped[n_stopped/2], 1e3*stopped[n_stopped - 1], 1e3*step[n/2]);
    end(&t[0]);
    end(&t[1]);
}

static void version(void) {
    struct sfi_init_params p = { sizeof(p), SFI_VERSION + 1, 0, 0 };
    need(sfi_init(&p) == SFI_ERR_VERSION, "a newer header is accepted");
    printf("%s\n", sfi_last_error());
    p.version = SFI_VERSION + 10000;
    need(sfi_init(&p) == SFI_ERR_VERSION, "another major version is accepted");
    p.version = SFI_VERSION;
    p.n_threads = 3;
    need(sfi_init(&p) == SFI_OK && llama_context_default_params().n_threads == 3, "threads");
    p.n_threads = -1;
    need(sfi_init(&p) == SFI_ERR_ARGUMENT, "a negative number of threads");
    p.struct_size = 0;
    need(sfi_init(&p) == SFI_ERR_ARGUMENT, "a struct without a size");
    need(sfi_init(NULL) == SFI_OK && llama_context_default_params().n_threads == sfi_threads(), "the defaults");
    struct { struct sfi_init_params known; int64_t unknown; } longer = { { sizeof(longer), SFI_VERSION, 0, 0 }, 0 };
    need(sfi_init(&longer.known) == SFI_OK, "a longer struct of zeros");
    longer.unknown = 1;
    need(sfi_init(&longer.known) == SFI_ERR_ARGUMENT, "a field that is not known");
    struct sfi * s = NULL;
    need(sfi_attach(NULL, NULL, &s) == SFI_ERR_ARGUMENT && strstr(sfi_last_error(), "log"), "no context");
}

int main(int argc, char ** argv) {
    if (argc < 3) {
        fprintf(stderr, "usage: %s WHAT MODEL.gguf\n", argv[0]);
        return 2;
    }
    sfi_log_set(quiet, NULL);
    model = llama_model_load_from_file(argv[2], llama_model_default_params());
    if (!model) {
        const int err = sfi_init(NULL);
        printf("no model: %s\n", err ? sfi_last_error() : "");
        return err ? 3 : 1;
    }
    const struct { const char * name; void (*run)(void); } all[] = {
        { "plainly", plainly }, { "threads", two_threads }, { "fork", forked }, { "signals", signals }, { "exit", exits },
        { "comma", comma }, { "memory", little_memory }, { "version", version },
    };
    for (size_t i = 0; i < sizeof(all)/sizeof(all[0]); ++i) {
        if (strcmp(all[i].name, argv[1]) == 0) {
            all[i].run();
            llama_model_free(model);
            return 0;
        }
    }
    const int32_t n = atoi(argc > 3 ? argv[3] : "1000");
    if (strcmp(argv[1], "cancel-steps") == 0) {
        cancel_steps(n);
        llama_model_free(model);
        return 0;
    }
    cancel(n, argc > 4 ? atof(argv[4]) : 0.05);
    llama_model_free(model);
    return 0;
}
