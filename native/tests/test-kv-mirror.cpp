// The mirror of a KV cache, against a cache of the simplest kind that is edited at random. Prints every failure; exit code 1
// if there was one.

#include "llama/kv-mirror.h"

#include <algorithm>
#include <cstdio>
#include <map>
#include <random>
#include <string>
#include <vector>

static int failures = 0;

static void check(bool ok, const std::string & what) {
    if (!ok) {
        printf("FAILED: %s\n", what.c_str());
        ++failures;
    }
}

static constexpr int32_t n_queries = 5;

// position -> cell, and which positions' queries were kept
struct cache {
    std::map<int32_t, int32_t> text;
    std::vector<int32_t>       kept; // the last so many, oldest first

    int32_t end() const { return text.empty() ? 0 : text.rbegin()->first + 1; }
    bool    holds(int32_t cell) const {
        return std::any_of(text.begin(), text.end(), [=](const auto & t) { return t.second == cell; });
    }
    std::vector<int32_t> cells() const {
        std::vector<int32_t> list;
        for (const auto & t : text) {
            list.push_back(t.second);
        }
        return list;
    }
};

static void compare(const llama_kv_mirror & m, const cache & c, const std::string & when) {
    const auto cells = c.cells();
    check(m.cells() == cells && m.size() == (int32_t) cells.size(), when + ": cells");
    const int32_t n_used = cells.empty() ? 0 : *std::max_element(cells.begin(), cells.end()) + 1;
    check(m.n_used() == n_used, when + ": n_used " + std::to_string(m.n_used()) + ", expected " + std::to_string(n_used));
    std::set<int32_t> holes;
    for (int32_t cell = 0; cell < n_used; ++cell) {
        if (!c.holds(cell)) {
            holes.insert(cell);
        }
    }
    check(m.holes() == holes, when + ": holes");
    for (const int32_t n_latest : { 1, 3, n_queries }) {
        std::vector<int32_t> seen(n_queries, 0);
        for (const int32_t pos : c.kept) {
            const int32_t age = c.end() - 1 - pos;
            seen[pos % n_queries] = age < n_latest ? std::max(0, m.size() - age) : 0;
        }
        check(m.seen(n_latest) == seen, when + ": what queries see");
    }
    check(m.query_rows().size() == c.kept.size(), when + ": rows of the ring");
    bool in_order = true;
    for (size_t i = 0; i < cells.size(); ++i) {
        in_order = in_order && cells[i] == (int32_t) i;
    }
    check(m.in_order() == in_order, when + ": order");
    const int32_t a = m.size()/3, b = m.size()/2;
    auto rest = cells;
    rest.erase(rest.begin() + a, rest.begin() + b);
    check(m.without(a, b) == rest, when + ": without a part");
}

static void add(llama_kv_mirror & m, cache & c, int32_t n, std::mt19937 & rng) {
    std::vector<uint32_t> cells;
    std::vector<int32_t> pos;
    const int32_t first = c.end();
    for (int32_t i = 0; i < n; ++i) {
        int32_t cell = (int32_t) (rng() % 200);
        while (c.holds(cell)) {
            cell = (cell + 1) % 200;
        }
        cells.push_back(cell);
        pos.push_back(first + i);
        c.text[first + i] = cell;
    }
    const int32_t n_stored = std::min(n, n_queries);
    for (int32_t i = n - n_stored; i < n; ++i) {
        c.kept.push_back(pos[i]);
    }
    if (c.kept.size() > n_queries) {
        c.kept.erase(c.kept.begin(), c.kept.end() - n_queries);
    }
    check(m.continues(first) == m.known(), "what comes after the text continues it");
    if (m.continues(first)) {
        m.append(cells);
    } else {
        m.read(c.cells());
    }
    m.store(pos.data(), n, n_stored);
}

static void take_back(llama_kv_mirror & m, cache & c, int32_t n) {
    for (int32_t i = 0; i < n; ++i) {
        c.text.erase(std::prev(c.text.end()));
    }
    c.kept.erase(std::remove_if(c.kept.begin(), c.kept.end(), [&](int32_t pos) { return pos >= c.end(); }), c.kept.end());
    m.take_back(n, c.end() - 1);
}

int main() {
    std::mt19937 rng(2603);
    for (int round = 0; round < 50; ++round) {
        llama_kv_mirror m(n_queries);
        cache c;
        check(!m.known() && !m.continues(0), "a new mirror knows nothing");
        add(m, c, 20, rng);
        for (int i = 0; i < 40; ++i) {
            const std::string when = "round " + std::to_string(round) + ", " + std::to_string(i);
            const int what = rng() % 10;
            if (what < 6 && c.text.size() < 150) {
                add(m, c, 1 + (int32_t) (rng() % 9), rng);
            } else if (what < 8 && c.text.size() > 12) {
                take_back(m, c, 1 + (int32_t) (rng() % 9));
            } else if (c.text.size() > 30) { // an edit in the middle
                c.text.erase(std::next(c.text.begin(), 10));
                c.kept.clear();
                m.forget();
                check(!m.known() && m.query_rows().empty(), when + ": forgotten");
                add(m, c, 1, rng);
            }
            compare(m, c, when);
        }
    }
    printf("%d failures\n", failures);
    return failures > 0;
}
