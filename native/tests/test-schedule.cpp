// The pure units: where boundaries are, and when a step is slow. Prints every failure; exit code 1 if there was one.

#include "sentences.h"
#include "schedule.h"

#include <cstdio>
#include <string>
#include <vector>

static int failures = 0;

static void check(bool ok, const std::string & what) {
    if (!ok) {
        printf("FAILED: %s\n", what.c_str());
        ++failures;
    }
}

// Indices of the tokens at which the detector fires.
static std::vector<int> boundaries(const std::vector<std::string> & tokens) {
    slowfast::boundary_detector detector;
    std::vector<int> at;
    for (int i = 0; i < (int) tokens.size(); ++i) {
        if (detector.feed(slowfast::classify(tokens[i]))) {
            at.push_back(i);
        }
    }
    return at;
}

static void expect_boundaries(const std::vector<std::string> & tokens, const std::vector<int> & expected) {
    std::string text;
    for (const auto & t : tokens) {
        text += "|" + t;
    }
    std::string got = " fires at";
    for (const int i : boundaries(tokens)) {
        got += " " + std::to_string(i);
    }
    check(boundaries(tokens) == expected, text + got);
}

static void test_boundaries() {
    expect_boundaries({ "It", " ended", ".", " The", " next" }, { 3 });
    expect_boundaries({ " Really", "?", " Yes", "!", " No" }, { 2, 4 });
    expect_boundaries({ " 3", ".", "1", "4", " is" }, {});
    expect_boundaries({ " e", ".", "g", ".", " this" }, {});
    expect_boundaries({ " v", "1", ".", "2", " is" }, {});
    expect_boundaries({ " said", ".\"", " She" }, { 2 });
    expect_boundaries({ " end", ".", "\"", " She" }, { 3 });
    expect_boundaries({ " end", ".)", " The" }, { 2 });
    expect_boundaries({ " a", ";", " b" }, { 2 });
    expect_boundaries({ "x", ";", "y" }, {});
    expect_boundaries({ " title", "\n", "\n", "word" }, { 3 });
    expect_boundaries({ " title", "\n\nThe", " rest" }, { 1 });
    expect_boundaries({ "f", "();", "\n", "    ", "return" }, { 4 });
    expect_boundaries({ "\u4f60\u597d", "\u3002", "\u518d\u89c1" }, { 2 });
    expect_boundaries({ "\u597d\uff1f", "\u662f", "\uff01", "\u5427" }, { 1, 3 });
    expect_boundaries({ " wait", "\u2026", " Then" }, { 2 });
    expect_boundaries({ " wait", "\u2026", " then" }, {});
    expect_boundaries({ ".", " ", "The" }, { 2 });
    expect_boundaries({ "", "word", "" }, {});
}

// as of policy frozen
static slowfast::schedule schedule() {
    slowfast::schedule s;
    s.max_span = 32;
    s.min_span = 16;
    s.boundary = true;
    return s;
}

static void expect(const char * what, const slowfast::schedule_input & in, slowfast::kind asked, slowfast::kind kind, slowfast::reason reason,
                   const slowfast::schedule & s = schedule()) {
    const auto d = slowfast::decide(s, in, asked);
    check(d.kind == kind && d.reason == reason, std::string(what) + ": kind " + std::to_string(d.kind) + ", reason " + std::to_string(d.reason));
}

static void test_schedule() {
    slowfast::schedule_input in;
    in.depth = 5000;
    expect("no support yet", in, slowfast::AUTO, slowfast::SLOW, slowfast::FIRST);
    expect("fast without support", in, slowfast::FAST, slowfast::AUTO, slowfast::NONE);
    in.edited = true;
    expect("edited cache", in, slowfast::AUTO, slowfast::SLOW, slowfast::INVALIDATED);
    in.valid = true;
    in.edited = false;
    expect("valid support", in, slowfast::AUTO, slowfast::FAST, slowfast::NONE);
    in.boundary = true;
    in.span = 15;
    expect("boundary within min_span", in, slowfast::AUTO, slowfast::FAST, slowfast::NONE);
    in.span = 16;
    expect("boundary", in, slowfast::AUTO, slowfast::SLOW, slowfast::BOUNDARY);
    in.span = 64;
    expect("end of the span", in, slowfast::AUTO, slowfast::SLOW, slowfast::MAX_SPAN);
    expect("fast beyond the span", in, slowfast::FAST, slowfast::FAST, slowfast::FORCED);
    in.window_full = true;
    expect("full window", in, slowfast::FAST, slowfast::SLOW, slowfast::MAX_SPAN);
    expect("forced dense", in, slowfast::DENSE, slowfast::DENSE, slowfast::FORCED);
    expect("forced slow", in, slowfast::SLOW, slowfast::SLOW, slowfast::FORCED);

    auto params = schedule();
    params.auto_depth = 5001;
    expect("short", in, slowfast::AUTO, slowfast::DENSE, slowfast::SHORT, params);
    params = schedule();
    params.boundary = false;
    in.window_full = false;
    in.span = 20;
    expect("boundaries off", in, slowfast::AUTO, slowfast::FAST, slowfast::NONE, params);
}

int main() {
    test_boundaries();
    test_schedule();
    printf("%d failures\n", failures);
    return failures ? 1 : 0;
}
