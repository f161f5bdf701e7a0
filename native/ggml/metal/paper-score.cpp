// The score by which GGML_SUPPORT_SELECTOR_PAPER selects: the kernels are in paper-score.metal.

#include "paper-score.h"

#include <algorithm>
#include <cstdio>

namespace sfi_metal {

bool paper_score_supported(const ggml_tensor * dst) {
    const ggml_tensor * k = dst->src[3];
    return kv_type_name(k->type) && k->ne[0] % 8 == 0 && k->ne[0] % ggml_blck_size(k->type) == 0 && has_aligned_rows(k);
}

paper_places take_paper(const ggml_tensor * dst, scratch_parts & parts) {
    const int64_t n_list = dst->src[0]->ne[0], n_head_kv = dst->ne[1], chunks = n_head_kv*n_chunks(n_list, paper_threads);
    paper_places p;
    p.f     = parts.take(n_head_kv*n_list, sizeof(float));
    p.r     = parts.take(n_head_kv*n_list, sizeof(float));
    p.of_f  = parts.take(chunks, 2*sizeof(float));
    p.of_r  = parts.take(chunks, 2*sizeof(float));
    p.apart = parts.take(chunks, 4*sizeof(float));
    return p;
}

static paper_args args_of_paper(const ggml_tensor * dst) {
    const ggml_tensor * evidence = dst->src[0], * k = dst->src[3];
    const ggml_support_selector s = selector_of(dst);
    paper_args a = {};
    a.evidence_ld = evidence->nb[1]/sizeof(float);
    a.k_nb1 = k->nb[1]; a.k_nb2 = k->nb[2];
    a.d           = (int) k->ne[0];
    a.n_list      = (int) evidence->ne[0];
    a.n_cells     = (int) k->ne[1];
    a.n_head_kv   = (int) evidence->ne[1];
    a.n_chunks    = (int) n_chunks(a.n_list, paper_threads);
    a.nms_radius  = std::min(s.nms_radius, a.n_list);
    a.alpha       = s.alpha;
    a.gamma       = s.gamma;
    a.beta        = s.beta;
    a.p           = s.p;
    a.eta         = s.eta;
    a.lambda_clip = s.lambda_clip;
    a.a_soft      = s.a_soft;
    a.a_cross     = s.a_cross;
    a.temperature = s.temperature;
    return a;
}

place paper_score(encoder & e, const ggml_tensor * dst, const paper_places & p) {
    const ggml_tensor * evidence = dst->src[0], * cells = dst->src[1], * plan = dst->src[2], * k = dst->src[3];
    const paper_args a = args_of_paper(dst);
    const groups     grid = { a.n_chunks, a.n_head_kv };
    char logs[64];
    snprintf(logs, sizeof(logs), "sfi_paper_logs_%s", kv_type_name(k->type));

    e.run(logs, a, { whole(evidence), whole(k), whole(cells), whole(plan), p.f, p.r, p.of_f, p.of_r }, grid, paper_threads);
    e.barrier();
    e.run("sfi_paper_shares", a, { p.of_f, p.of_r, p.f, p.r, p.apart }, grid, paper_threads);
    e.barrier();
    e.run("sfi_paper_fuse", a, { p.apart, p.r, p.f }, grid, paper_threads);
    e.barrier();
    e.run("sfi_paper_nms", a, { whole(plan), p.f, p.r }, grid, paper_threads);
    e.barrier();
    if (a.n_head_kv > 2) {
        e.run("sfi_paper_compete", a, { whole(plan), p.r }, { a.n_chunks }, paper_threads);
        e.barrier();
    }
    return p.r;
}

} // namespace sfi_metal
