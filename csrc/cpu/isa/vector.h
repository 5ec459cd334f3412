// The vector type of each element type. (No #pragma once: each instruction set defines its own.)

struct Floats;   // 16 lanes
struct Doubles;  // 8 lanes

template <typename T>
struct VectorFor {
  using type = Floats;
};
template <>
struct VectorFor<double> {
  using type = Doubles;
};
template <typename T>
using VectorOf = typename VectorFor<T>::type;
