// The vector type of each element type. Every instruction set includes this before its vector_*.h,
// inside its own namespace, and defines its own vectors. (No #pragma once for this reason.)

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
