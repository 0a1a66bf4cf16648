"""The demo CRM's vocabulary: what is taught where, how people find it, and what people are called.

Constants only. Names are made up from small lists, mail domains are reserved by RFC 2606, telephone numbers
lie in ranges reserved for fiction: nothing here can reach a real person. Used by the demo CRM alone.
"""

# ruff: noqa: SIM905

from typing import NamedTuple


class Source(NamedTuple):
    """How leads find us.

    `share` of all leads, `effect` on the log-odds of applying, share of the form they fill in, usual minutes
    until they are answered, share whose visits to the site can be tracked.
    """

    name: str
    share: float
    effect: float
    fills: float
    answer_minutes: float
    tracked: float


class Programme(NamedTuple):
    """A programme: `campus` is an index into `CAMPUSES`, `tuition_fee` is for a year."""

    name: str
    level: str
    study_mode: str
    campus: int
    tuition_fee: int
    share: float
    effect: float


class Choice(NamedTuple):
    """One value of an attribute: its share of all leads and its effect on the log-odds of applying."""

    name: str
    share: float
    effect: float


SOURCES = (
    Source("Website form", 0.26, 0.15, 0.70, 180, 0.95),
    Source("Paid search", 0.18, -0.75, 0.62, 150, 0.90),
    Source("Social media", 0.17, -1.65, 0.52, 420, 0.75),
    Source("Education fair", 0.10, 0.3, 0.72, 1900, 0.35),
    Source("Referral", 0.08, 2.1, 0.74, 120, 0.60),
    Source("Agent", 0.08, 1.2, 0.80, 600, 0.30),
    Source("Portal listing", 0.07, -1.35, 0.58, 300, 0.65),
    Source("Open day", 0.06, 1.65, 0.76, 900, 0.70),
)

CAMPUSES = (
    ("Harbour Campus", "Northport"),
    ("Hill Campus", "Ashford Vale"),
    ("Riverside Campus", "Millbrook"),
)
CAMPUS_EFFECTS = (0.15, -0.25, 0.05)

PROGRAMMES = (
    Programme("Computer Science BSc", "bachelor", "full-time", 0, 9800, 0.13, 0.45),
    Programme("Business Administration BA", "bachelor", "full-time", 1, 8900, 0.13, -0.3),
    Programme("Nursing BSc", "bachelor", "full-time", 2, 7400, 0.09, 0.9),
    Programme("Psychology BSc", "bachelor", "full-time", 1, 8600, 0.09, -0.45),
    Programme("Graphic Design BA", "bachelor", "part-time", 0, 7900, 0.06, -0.9),
    Programme("Civil Engineering BEng", "bachelor", "full-time", 2, 9900, 0.07, 0.15),
    Programme("Data Science MSc", "master", "full-time", 0, 13800, 0.10, 0.6),
    Programme("Public Health MSc", "master", "part-time", 2, 11200, 0.06, 0.3),
    Programme("International Business MSc", "master", "full-time", 1, 12900, 0.08, 0.0),
    Programme("Executive MBA", "master", "part-time", 1, 24500, 0.05, -1.2),
    Programme("Software Engineering MSc", "master", "online", 0, 9400, 0.06, -0.15),
    Programme("Digital Marketing Certificate", "certificate", "online", 1, 2400, 0.05, -0.6),
    Programme("Teaching Assistant Certificate", "certificate", "part-time", 2, 1900, 0.03, 0.75),
)

COUNTRIES = (
    Choice("United Kingdom", 0.46, 0.25),
    Choice("India", 0.14, -0.2),
    Choice("Nigeria", 0.09, -0.5),
    Choice("Germany", 0.08, 0.2),
    Choice("Ireland", 0.07, 0.3),
    Choice("France", 0.06, 0.0),
    Choice("Pakistan", 0.05, -0.4),
    Choice("United States", 0.05, -0.1),
)

EDUCATION = (
    Choice("secondary", 0.50, 0.1),
    Choice("bachelor", 0.33, 0.2),
    Choice("diploma", 0.12, -0.2),
    Choice("master", 0.05, -0.4),
)

MONTHS = (1.45, 1.15, 1.0, 0.85, 0.8, 0.75, 0.8, 1.3, 1.4, 1.1, 0.85, 0.55)
"""Enquiries by calendar month, relative to an average one."""
WEEKDAYS = (1.25, 1.2, 1.15, 1.1, 0.95, 0.6, 0.75)
"""Enquiries by day of the week, Monday first."""
HOURS = (1, 0.6, 0.4, 0.3, 0.3, 0.5, 1, 2, 4, 5.5, 6, 6, 5.5, 5.5, 5.5, 5.5, 5, 4.5, 4.5, 5, 5.5, 5, 3.5, 2)
"""Enquiries by hour of the day (UTC)."""

FIRST_NAMES = tuple(
    "Ada Amara Anika Arjun Asha Ben Bilal Carla Chidi Clara Daniel David Elena Elif Emeka Emma Farah "
    "Felix Finn Fiona George Grace Hannah Hugo Imran Ines Isla Ivan Jack James Jana Jonas Julia Kemi "
    "Kiran Laila Lara Leo Liam Lucas Lucy Maja Marco Maria Meera Mia Nadia Nina Noah Nora Oliver Omar "
    "Oscar Paula Priya Rahul Rosa Sam Sara Sofia Tara Theo Tom Uche Vera Viktor Will Yusuf Zara Zoe".split()
)
LAST_NAMES = tuple(
    "Adeyemi Ahmed Bailey Banerjee Barker Bauer Becker Bello Bennett Byrne Carter Chaudhry Clarke Cole "
    "Costa Dubois Doyle Edwards Eze Fischer Fletcher Foster Garcia Gupta Hall Harris Hoffmann Hughes "
    "Iqbal Jackson Jones Kaur Keller Khan King Kumar Lambert Lawal Lewis Malik Martin Mehta Moreau Morgan "
    "Murphy Nair Nolan Novak Obi Okafor Parker Patel Quinn Rao Reid Richter Rossi Schmidt Shah Sharma "
    "Silva Singh Smith Stone Taylor Turner Walker Weber White Wilson Young".split()
)
MAIL_DOMAINS = ("example.com", "example.org", "example.net", "mail.example", "students.example")
PHONE_PREFIXES = ("+44 7700 900", "+44 20 7946 0", "+44 113 496 0", "+44 161 496 0")
"""Ranges Ofcom reserves for drama; three more digits follow."""
NOTES = (
    "Asked about accommodation.",
    "Would like to talk to a current student.",
    "Interested in scholarships, please send the list.",
    "Prefers to be called after 17:00.",
    "Parent will join the call.",
    "Wants to compare with a part-time option.",
    "Asked for the deadline and the documents.",
    "Spoke at the fair, very friendly.",
)
