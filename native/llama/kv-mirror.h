// The cells that a sequence holds in a KV cache, in the order of the text, and the positions of the queries that are kept of it.
//
// Pure: no ggml, no llama. The support tells it what the cache does.

#pragma once

#include <cstdint>
#include <set>
#include <vector>

class llama_kv_mirror {
public:
    // n_queries: the latest so many queries are kept, in a ring: that of position p in row p % n_queries
    explicit llama_kv_mirror(int32_t n_queries) : query_pos(n_queries, -1) {}

    // Whether it holds what the cache does; after an edit it does not until read().
    bool    known()  const { return is_known; }
    int32_t size()   const { return (int32_t) text.size(); }
    int32_t n_used() const { return n_below; } // the largest used cell + 1
    int32_t last_pos() const { return last; }
    const std::vector<int32_t> & cells() const { return text; }
    const std::set<int32_t>    & holes() const { return unused; } // cells below n_used() that the sequence does not hold

    // An edit that nobody announced.
    void forget();

    // The whole text anew.
    void read(std::vector<int32_t> cells);

    // A text of n tokens, of which cell i holds token i; positions: of the queries in the ring, -1: none. Those behind the text are dropped.
    void restore(int32_t n, std::vector<int32_t> positions);

    // New tokens: their cells go to the end of the text. `first_pos` must lie behind the text, see continues().
    void append(const std::vector<uint32_t> & cells);
    bool continues(int32_t first_pos) const { return is_known && first_pos > last; }

    // The positions of n tokens at the end of the text, of which the queries of the last n_stored were kept.
    void store(const int32_t * pos, int32_t n, int32_t n_stored);

    // The last n tokens are gone; last_pos is the position of the one before them.
    void take_back(int32_t n, int32_t last_pos);

    // The position of each row of the ring, -1: unused.
    const std::vector<int32_t> & query_positions() const { return query_pos; }

    // The rows of the ring that hold queries.
    std::vector<int32_t> query_rows() const;

    // How many cells the query of each row of the ring sees, if it is one of the n latest, else 0.
    std::vector<int32_t> seen(int32_t n_latest) const;

    // The cells of the text but those of places [first, second).
    std::vector<int32_t> without(int32_t first, int32_t second) const;

    // Whether cell i holds token i.
    bool in_order() const;

private:
    bool is_known = false;
    std::vector<int32_t> text;
    std::set<int32_t>    unused;
    std::vector<int32_t> query_pos; // of each row of the ring, -1: unused
    int32_t n_below = 0;
    int32_t last    = -1;
};
