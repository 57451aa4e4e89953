"""Utilities below all other rooms; none imports torch.

format      numbers, durations and counts as text
io          atomic writes, JSON Lines and file locks
reading     guards the readers of foreign files: every failure names the file and the cure
redact      keeps secrets out of all that is printed and written
progress    says how far slow work is, now and then
run_layout  RunDir: the names of the files of a run
utf8        UTF-8 for all text of a process, whatever the locale
extra_packages  packages that only some data need, added when first asked for
seeding     random numbers and seeds as functions of names
streams     standard output and error, whose failure ends no work
"""
