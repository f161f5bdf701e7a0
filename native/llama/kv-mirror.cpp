#include "kv-mirror.h"

#include <algorithm>
#include <numeric>

void llama_kv_mirror::forget() {
    is_known = false;
    std::fill(query_pos.begin(), query_pos.end(), -1);
}

void llama_kv_mirror::read(std::vector<int32_t> cells) {
    text     = std::move(cells);
    is_known = true;
    n_below  = text.empty() ? 0 : *std::max_element(text.begin(), text.end()) + 1;
    std::vector<bool> used(n_below, false);
    for (const int32_t cell : text) {
        used[cell] = true;
    }
    unused.clear();
    for (int32_t cell = 0; cell < n_below; ++cell) {
        if (!used[cell]) {
            unused.insert(cell);
        }
    }
}

void llama_kv_mirror::restore(int32_t n, std::vector<int32_t> positions) {
    std::vector<int32_t> cells(n);
    std::iota(cells.begin(), cells.end(), 0);
    read(std::move(cells));
    last      = n - 1;
    query_pos = std::move(positions);
    for (auto & pos : query_pos) {
        pos = pos > last ? -1 : pos;
    }
}

void llama_kv_mirror::append(const std::vector<uint32_t> & cells) {
    for (const uint32_t c : cells) {
        const int32_t cell = (int32_t) c;
        for (; n_below <= cell; ++n_below) {
            unused.insert(n_below);
        }
        unused.erase(cell);
        text.push_back(cell);
    }
}

void llama_kv_mirror::store(const int32_t * pos, int32_t n, int32_t n_stored) {
    last = pos[n - 1];
    for (int32_t i = n - n_stored; i < n; ++i) {
        query_pos[pos[i] % (int32_t) query_pos.size()] = pos[i];
    }
}

void llama_kv_mirror::take_back(int32_t n, int32_t last_pos) {
    unused.insert(text.end() - n, text.end());
    text.resize(text.size() - n);
    while (!unused.empty() && *unused.rbegin() == n_below - 1) {
        unused.erase(--n_below);
    }
    last = last_pos;
    for (auto & pos : query_pos) {
        pos = pos > last ? -1 : pos;
    }
}

std::vector<int32_t> llama_kv_mirror::query_rows() const {
    std::vector<int32_t> rows;
    for (size_t i = 0; i < query_pos.size(); ++i) {
        if (query_pos[i] >= 0) {
            rows.push_back((int32_t) i);
        }
    }
    return rows;
}

std::vector<int32_t> llama_kv_mirror::seen(int32_t n_latest) const {
    std::vector<int32_t> out;
    for (const int32_t pos : query_pos) {
        const int32_t age = last - pos;
        out.push_back(pos >= 0 && age < n_latest ? std::max(0, size() - age) : 0);
    }
    return out;
}

std::vector<int32_t> llama_kv_mirror::without(int32_t first, int32_t second) const {
    std::vector<int32_t> list(text.begin(), text.begin() + first);
    list.insert(list.end(), text.begin() + second, text.end());
    return list;
}

bool llama_kv_mirror::in_order() const {
    for (int32_t i = 0; i < size(); ++i) {
        if (text[i] != i) {
            return false;
        }
    }
    return true;
}
