"Code written with the old names goes on working, and is told the new ones"
import subprocess, sys

import pytest
import sasformer.ltf, sasformer.sasformer, sasformer.tel, sasformer.treefilter

# every public name of the two modules as they were
AFFINITY = 'DISTANCES PAPER RELEASED DEFAULT FORMS propagate Form counted_rows draw_every affinity_loss combine'.split()
TREE = dict(treefilter=('compiled grid_distances Tree tree_of minimum_spanning_tree affinity_to_parent '
                        'edge_affinity tree_filter').split(),
            tel='soft_labels tree_energy TreeEnergyLoss tree_embedding'.split(),
            ltf='TreeFilter RefineResidual LTFDecoder'.split())


def test_affinity():
    import sasformer.affinity as old
    for name in AFFINITY:
        with pytest.warns(DeprecationWarning, match='sasformer.affinity is now sasformer.sasformer'):
            found = getattr(old, name)
        renamed = dict(counted_rows='counted_positions', draw_every='draw_positions')
        assert found is getattr(sasformer.sasformer, renamed.get(name, name))
    with pytest.raises(AttributeError, match='sasformer.affinity has no propagated'): old.propagated


def test_affinity_loss():
    from sasformer.affinity import AffinityLoss
    with pytest.warns(DeprecationWarning, match='AffinityLoss is now sasformer.sasformer.SASFormerLoss'):
        loss = AffinityLoss(.3, 'released', start=.5, warmup=.1)
    new = sasformer.sasformer.SASFormerLoss(.3, 'released', start=.5, warmup=.1)
    assert isinstance(loss, sasformer.sasformer.SASFormerLoss)
    assert (loss.weight, loss.form, loss.start, loss.warmup) == (new.weight, new.form, new.start, new.warmup)
    assert loss.name == 'affinity_loss' and new.name == 'sasformer_loss'   # learn.affinity_loss, learn.sasformer_loss


def test_tree():
    import sasformer.tree as old
    for module, names in TREE.items():
        for name in names:
            message = 'sasformer.tree is now sasformer.treefilter, sasformer.ltf and sasformer.tel'
            with pytest.warns(DeprecationWarning, match=message): found = getattr(old, name)
            assert found is getattr(getattr(sasformer, module), name)
    with pytest.raises(AttributeError, match='sasformer.tree has no forest'): old.forest


def test_star_imports_in_a_fresh_process():
    code = ('from sasformer.affinity import *\nfrom sasformer.tree import *\n'
            f'assert all(o in globals() for o in {AFFINITY+sum(TREE.values(), [])+["AffinityLoss"]})')
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count('DeprecationWarning: sasformer.affinity') == 1
    assert done.stderr.count('DeprecationWarning: sasformer.tree') == 1


def test_all_says_nothing():
    code = 'from sasformer.all import *; assert AffinityLoss and SASFormerLoss'
    command = [sys.executable, '-W', 'error::DeprecationWarning:__main__', '-c', code]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0 and 'is now' not in done.stderr, done.stderr
