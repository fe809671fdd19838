#pragma once
// Errors of the native floor: FT_REQUIRE is the caller's fault (ValueError in Python).

#include <sstream>
#include <stdexcept>

#define FT_REQUIRE(condition, message)         \
  do {                                         \
    if (!(condition)) {                        \
      std::ostringstream text;                 \
      text << __func__ << ": " << message;     \
      throw std::invalid_argument(text.str()); \
    }                                          \
  } while (false)
