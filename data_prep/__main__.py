"""`python -m data_prep` says which programs there are."""

import data_prep

if __name__ == "__main__":
    print(data_prep.__doc__)
