"""Scripts that a newcomer can read and run; the tests run each of them."""
