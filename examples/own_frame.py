"""A data frame of one's own: reaction times of 18 people over ten days without sleep.

python examples/own_frame.py          (simulated data in the manner of the sleep study)
"""

from pathlib import Path

import pandas as pd

import hbmeta as hb
from hbmeta import inference, models, tasks

FILE = Path(__file__).parent / "data" / "sleep.csv"


def main(steps=1500, draws=1000):
    frame = pd.read_csv(FILE)
    people = tasks.from_frame(frame, group="subject", x=["days"], y="reaction")
    # The first seven days of every person are known, the last three are to be predicted.
    known = people.split(support=0.7, order="days", seed=0)
    model = models.VaryingEffects(varying=["intercept", "days"])
    fits = {
        "nuts": inference.NUTS(draws=draws).fit(model, known),
        "exact": inference.ExactLinear().fit(model, known),
        "amortized": inference.AmortizedGuide().fit(model, known, steps=steps),
        "no pooling": inference.NoPooling().fit(model, known),
    }
    print(hb.compare(fits, known, reference="nuts"))
    # Day 10 of a person we know, and of one of whom we know two days.
    wanted = pd.DataFrame({"subject": [frame.subject[0], "newcomer"], "days": [10, 10]})
    seen = pd.DataFrame({"subject": ["newcomer"] * 2, "days": [0, 1], "reaction": [210.0, 215.0]})
    print(fits["nuts"].predict(wanted, support=seen))
    return fits


if __name__ == "__main__":
    main()
