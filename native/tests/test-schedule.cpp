// The pure units: where boundaries are, and when a step is slow. Prints every failure; exit code 1 if there was one.

#include "boundary.h"
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

static void expect(const char * what, const slowfast::schedule_input & in, sfi_step_kind asked, sfi_step_kind kind, sfi_reason reason,
                   const sfi_params & params = sfi_policy_params(SFI_POLICY_FROZEN)) {
    const auto d = slowfast::decide(params, in, asked);
    check(d.kind == kind && d.reason == reason, std::string(what) + ": " + sfi_kind_name(d.kind) + ", " + sfi_reason_name(d.reason));
}

static void test_schedule() {
    slowfast::schedule_input in;
    in.depth = 5000;
    expect("no support yet", in, SFI_STEP_AUTO, SFI_STEP_SLOW, SFI_REASON_FIRST);
    expect("fast without support", in, SFI_STEP_FAST, SFI_STEP_AUTO, SFI_REASON_NONE);
    in.edited = true;
    expect("edited cache", in, SFI_STEP_AUTO, SFI_STEP_SLOW, SFI_REASON_INVALIDATED);
    in.valid = true;
    in.edited = false;
    expect("valid support", in, SFI_STEP_AUTO, SFI_STEP_FAST, SFI_REASON_NONE);
    in.boundary = true;
    in.span = 15;
    expect("boundary within min_span", in, SFI_STEP_AUTO, SFI_STEP_FAST, SFI_REASON_NONE);
    in.span = 16;
    expect("boundary", in, SFI_STEP_AUTO, SFI_STEP_SLOW, SFI_REASON_BOUNDARY);
    in.span = 64;
    expect("end of the span", in, SFI_STEP_AUTO, SFI_STEP_SLOW, SFI_REASON_MAX_SPAN);
    expect("fast beyond the span", in, SFI_STEP_FAST, SFI_STEP_FAST, SFI_REASON_FORCED);
    in.window_full = true;
    expect("full window", in, SFI_STEP_FAST, SFI_STEP_SLOW, SFI_REASON_MAX_SPAN);
    expect("forced dense", in, SFI_STEP_DENSE, SFI_STEP_DENSE, SFI_REASON_FORCED);
    expect("forced slow", in, SFI_STEP_SLOW, SFI_STEP_SLOW, SFI_REASON_FORCED);

    sfi_params params = sfi_policy_params(SFI_POLICY_FROZEN);
    params.auto_depth = 5001;
    expect("short", in, SFI_STEP_AUTO, SFI_STEP_DENSE, SFI_REASON_SHORT, params);
    params = sfi_policy_params(SFI_POLICY_FROZEN);
    params.boundary = false;
    in.window_full = false;
    in.span = 20;
    expect("boundaries off", in, SFI_STEP_AUTO, SFI_STEP_FAST, SFI_REASON_NONE, params);
}

int main() {
    test_boundaries();
    test_schedule();
    printf("%d failures\n", failures);
    return failures ? 1 : 0;
}
