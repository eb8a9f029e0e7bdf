"""What a refusal looks like, and what leads to one."""


def refuse(outcome, *mentions):
    """The outcome is a failure with one message, which mentions all of `mentions`."""
    assert outcome.code == 1, (outcome.out, outcome.err)
    assert outcome.out == ""
    assert "Traceback" not in outcome.err
    assert sum(line.startswith(("error:", "Error:")) for line in outcome.err.splitlines()) == 1
    for mention in mentions:
        assert str(mention) in outcome.err


def misuse(outcome, *mentions):
    """The outcome is wrong usage of the command line, reported in one line that mentions all of `mentions`."""
    assert outcome.code == 2, (outcome.out, outcome.err)
    assert outcome.out == ""
    assert "Traceback" not in outcome.err
    for mention in mentions:
        assert str(mention) in outcome.err


def extract(agiqa, data, store, model, *options):
    return agiqa("extract", data, store, "--model", model, "--device", "cpu", "--json", *options)


def truncate(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
