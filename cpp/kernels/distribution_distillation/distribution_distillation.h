// File: kernels/distribution_distillation/distribution_distillation.h
//
// How far the distribution of a student's pairwise similarities is from the teacher's, with the gradient. The
// definition is pykd/losses/relations/distribution_distillation.py, from the point where the embeddings have length 1:
//
//     s_ij     = x_i . x_j                      x: the student's embeddings; for the teacher's likewise
//     h_r(A)   ~ sum over a in A of exp(-(a - t_r)^2 / (2 width^2)), sum over r = 1;   t_r = -1 + 2 r / (bins - 1)
//     positive = sum over r of p_r (log p_r - log q_r), where p and q are the h of the teacher's and the student's
//                positive pairs: of every two samples of one label
//     negative = the same of the negative pairs: the hardest of every sample, or all
//     order    = 2 (mean of the student's negatives + of the teacher's - of the student's positives - of the teacher's)
//     grad_i   = sum over j of w_ij x_j,   w_ij = d (positive_weight positive + ...) / d s_ij
//
// Pairs of a sort that the batch does not have give 0. Samples that are equally similar to an anchor share the
// gradient of its hardest negative. A row whose squared length is NaN or above 1.001 makes every value that has pairs
// NaN, and the gradient too, unless all weights are 0: then it is exactly 0.
//
// How. Nothing has the size pairs x bins. [-1, 1] is cut into cells, so narrow that within one of them, with c its
// centre, h half its width and g = 1 / (2 width^2),
//
//     exp(-g (c + h u - t)^2) = exp(-g (c - t)^2) exp(-g h^2 u^2) exp(y u),  y = -2 g h (c - t),  |y| <= 1/2, |u| <= 1
//
// is a short series. A pair adds exp(-g h^2 u^2) u^m, m = 0 ... 7, to its cell; a node sums, over the cells that hold
// pairs, one exponential times a polynomial of degree 7. What the series leaves out of a pair's part is at most
// (1/2)^8 / 8! e^(1/2) = 1.6e-7 of that part, where the pair and the node lie at opposite ends of the range.
// Logarithms are taken relative to the nearest cell that holds pairs; pairs that are e^-40 of it or less are left out.
// So they are right to float32 even in tails that float32 cannot hold. Backwards it is the same: within a cell the
// slope with respect to a similarity is a polynomial of degree 7, whose coefficients are sums over nodes.
//
// That costs pairs x 8 + cells x bins x 8, against pairs x bins x several exponentials. What remains are the products:
// N^2 D for the similarities of both sides and, with negatives "all", as much for the gradient. With "hardest" few
// w_ij are not 0, and only those are multiplied.
//
// Memory: 1.2 floats for each ordered pair of samples, the embeddings of one side once more, and the cells: at most
// 5 MB for widths from 0.1 on, 15 MB for the narrowest.
//
// Threads: the same bits whatever their number. Pairs are summed by blocks of rows, which depend on N and width alone,
// in float64; blocks are added in order. Small problems stay on the thread that calls.
//
// On CUDA (distribution_distillation_kernels.cuh) cells hold whole numbers, multiples of 2^-27 or less, which sum up to
// the same bits in any order; nodes and slopes are summed in float64. All w_ij are multiplied, those that are 0, too.
// The scratch memory is N^2 floats, 2 N D more, and N D for each of at most 8 shares of the gradient; N is at most
// 2^17.
#ifndef PYKD_KERNELS_DISTRIBUTION_DISTILLATION_DISTRIBUTION_DISTILLATION_H_
#define PYKD_KERNELS_DISTRIBUTION_DISTILLATION_DISTRIBUTION_DISTILLATION_H_

#include "kernels/kernel.h"

namespace pykd::kernels {

// "distribution_distillation": student, teacher "batch channels" (float32 alone), labels "batch" index,
// positive_weight, negative_weight, order_weight "" float32 optional -> positive, negative, order "" float32,
// grad_student "batch channels". A weight that is left out counts as 0. Attributes: bins (1000), width (0.1; at least
// 0.01), negatives (hardest or all).
void distribution_distillation(const Call& call);

}  // namespace pykd::kernels

#endif  // PYKD_KERNELS_DISTRIBUTION_DISTILLATION_DISTRIBUTION_DISTILLATION_H_
