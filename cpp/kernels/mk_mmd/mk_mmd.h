// File: kernels/mk_mmd/mk_mmd.h
//
// Squared maximum mean discrepancy with five Gaussian kernels between two sets of N samples with D features, and its
// gradient. The definition is pykd/losses/features/mk_mmd.py, where the samples are normalised and flattened already:
//
//     k(u, v) = sum over f in {1, 2, 4, 8, 16} of exp(-|u - v|^2 / (2 f s2))
//     value   = mean k(x_i, x_j) + mean k(y_i, y_j) - 2 mean k(x_i, y_j)      x: student, y: teacher
//     grad_i  = weight 2 / N^2 [ - sum_j w(x_i, x_j) (x_i - x_j) + sum_j w(x_i, y_j) (x_i - y_j) ]
//     w(u, v) = sum over f of exp(-|u - v|^2 / (2 f s2)) / (f s2)
//
// s2 is a mean squared distance, a constant for the gradient: attribute bandwidth "joint" (one for the three means) or
// "per_block" (one for each). Where a mean has s2 <= 1e-20 its samples coincide: each kernel of it is 1, its gradient
// 0.
//
// How. No matrix of N x N is ever whole. The samples are cut into tiles of at most kTileRows; a pair of tiles is one
// matrix product (distances), one exponential per distance (four squarings give the other kernels), and for the
// gradient one more product, or two: a tile of x with another serves the gradients of both. So value and gradient
// together cost 8 N^2 D multiplications and additions, against 12 N^2 D of a plain forward and backward pass.
//
// How exact. Each set is moved to its own centre, in float64, before it is rounded to float32, and s2 is had from sums
// over samples in float64: samples that lie close together, far from the origin or from the other set, keep their
// digits. Products are summed in float32 (at most kDepth terms in a row, then tile by tile), kernels in float32 along
// a row of a tile and in float64 beyond.
//
// Memory: 2 N D floats for the value, 4 N D with the gradient (D rounded up to the width of a panel, at most 48), and
// one tile of kTileRows^2 floats for each thread that works.
//
// Threads: the same bits whatever their number. Which tiles meet depends on N and the instruction set alone. A round of
// pairs of student tiles is a round of a tournament, in which no tile has two opponents; so each gradient is summed in
// the order of the rounds. Small problems stay on the thread that calls.
//
// On CUDA (mk_mmd_kernels.cuh) a tile of students meets all tiles itself, 12 N^2 D multiplications and additions, and
// the scratch memory is 2 N D floats, and N D more for each of at most 8 shares of the gradient.
//
// Squared norms must fit float32; NaN and infinities make the value and the gradient NaN.
#ifndef PYKD_KERNELS_MK_MMD_MK_MMD_H_
#define PYKD_KERNELS_MK_MMD_MK_MMD_H_

#include "kernels/kernel.h"

namespace pykd::kernels {

// "mk_mmd": student, teacher "batch features" (float32 alone), weight "" float32 optional
//        -> value "" float32, grad_student "batch features" (needs weight).
void mk_mmd(const Call& call);

}  // namespace pykd::kernels

#endif  // PYKD_KERNELS_MK_MMD_MK_MMD_H_
