// Trains one neuron in C++. Exits with 1 if it doesn't learn or differs from ATen.

#include <ATen/ATen.h>
#include <neuron_ext/ops.h>

#include <cstdio>
#include <cstdlib>

namespace {

void expect(bool holds, const char* what) {
  if (!holds) {
    std::fprintf(stderr, "train_neuron: %s\n", what);
    std::exit(1);
  }
}

}  // namespace

int main() {
  at::manual_seed(0);
  const at::Tensor x = at::randn({64, 3});
  const at::Tensor target = (x.sum(1, /*keepdim=*/true) > 0).to(at::kFloat);
  at::Tensor weight = at::zeros({1, 3}).requires_grad_();
  at::Tensor bias = at::zeros({1}).requires_grad_();

  double first_loss = 0, loss = 0;
  for (int step = 0; step < 100; ++step) {
    const at::Tensor y = neuron_ext::linear_sigmoid(x, weight, bias);
    expect(at::allclose(y, at::sigmoid(at::linear(x, weight, bias))), "output differs from ATen's");
    const at::Tensor error = at::mse_loss(y, target);
    error.backward();

    // d/dweight and d/dbias of mean((y - target)²), by hand.
    const at::Tensor dz = 2.0 / 64 * (y - target) * y * (1 - y);
    expect(at::allclose(weight.grad(), at::mm(dz.t(), x)), "weight's gradient is wrong");
    expect(at::allclose(bias.grad(), dz.sum(0)), "bias's gradient is wrong");

    weight.data().sub_(5 * weight.grad());
    bias.data().sub_(5 * bias.grad());
    weight.mutable_grad().reset();
    bias.mutable_grad().reset();

    loss = error.item<double>();
    if (step == 0) first_loss = loss;
  }
  std::printf("train_neuron: loss %.4f -> %.4f\n", first_loss, loss);
  expect(loss < first_loss / 4, "the loss doesn't fall");
}
