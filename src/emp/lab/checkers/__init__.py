"""What watches a lab from outside and says whether EMP has kept its word: for the fault tests and for long runs.

Each checker relies on facts that the product has no hand in (the scheduler's account of a thread, frames on a wire, a
file below a volume) or on several accounts that have to agree. Each returns what is wrong as sentences, none when all
is well. ``tests/fault/test_planted.py`` plants one violation for each on a real pool and sees it caught.
"""
